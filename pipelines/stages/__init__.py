"""The stages of a run as Beam transforms, and `generate`, which is built in the same way."""
