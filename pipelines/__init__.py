"""Moves data between the stages at any scale, and the command line. The only user of Beam."""
