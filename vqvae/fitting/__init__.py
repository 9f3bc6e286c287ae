"""Training code shared by both stages."""
