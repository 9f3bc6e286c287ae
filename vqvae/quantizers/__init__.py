"""Quantizers: each replaces the vectors of a grid by the nearest of a finite set."""
