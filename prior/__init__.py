"""Stage 2: the prior, a transformer that models and samples codes."""
