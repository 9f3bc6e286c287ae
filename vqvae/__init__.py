"""Stage 1: images to grids of discrete codes and back, and the file contracts of both."""
