"""A page about trained runs, for people."""
