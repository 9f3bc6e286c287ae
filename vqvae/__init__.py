"""Stage 1: a VQ-VAE that maps images to discrete codes and back, and all on-disk formats."""
