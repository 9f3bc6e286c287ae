"""Runs `vqbeam` as `python -m pipelines`."""

import sys

# The pipelines live in modules of their own, for what __main__ defines no worker can import.
from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
