"""The stages of a run as Beam transforms, and `generate`, which is built like one."""
