"""Quantizers: layers that replace each vector of a grid with one from a finite set."""
