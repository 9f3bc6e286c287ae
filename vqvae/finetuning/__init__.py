"""The second part of stage 1: the decoder is trained alone, on fixed codes, for sharper images."""
