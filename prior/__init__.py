"""Stage 2: codes to new codes."""
