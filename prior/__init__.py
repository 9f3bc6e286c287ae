"""Stage 2: code grids to new code grids."""
