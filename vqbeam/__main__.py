"""Runs the command line as `python -m vqbeam`."""

import sys

from vqbeam.pipelines.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
