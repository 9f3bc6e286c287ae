"""Moves data between the stages at any scale; has the command line. The only user of Beam."""
