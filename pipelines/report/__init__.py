"""The report: a page about trained runs, for people."""
