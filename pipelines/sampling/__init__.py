"""New images from a trained run, and what else its prior can do."""
