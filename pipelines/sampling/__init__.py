"""New images from a trained run, and other uses of its models."""
