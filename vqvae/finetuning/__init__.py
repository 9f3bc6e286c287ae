"""The second part of stage 1: training the decoder alone, on fixed codes, for sharper images."""
