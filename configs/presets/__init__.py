"""The built-in presets, one module each."""
