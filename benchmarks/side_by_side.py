"""Compares several programs, which take turns, each in its own processes."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict

FOLDER = pathlib.Path(__file__).parent


class Results:
    """The measurements of one side in one case, over all turns."""

    def __init__(self):
        self.seconds = defaultdict(lambda: defaultdict(list))
        self.records = {}
        self.least_bytes = {}

    def add(self, records: list[dict]) -> None:
        """Adds the measurements that one process reported."""
        for record in records:
            work = record["work"]
            self.records[work] = record
            if "seconds" in record:
                self.seconds[work][record["variant"]].append(record["seconds"])
            if "bytes" in record:
                self.least_bytes[work] = min(record["bytes"], self.least_bytes.get(work, 2**62))

    def fastest(self, work: str) -> tuple[float, str]:
        """Returns the shortest median time of all variants, in seconds, and the variant."""
        return min((statistics.median(times), name) for name, times in self.seconds[work].items())

    def fastest_variants(self) -> list[str]:
        """Returns the fastest variant of each kind of work."""
        return sorted({self.fastest(work)[1] for work in self.seconds} - {""})


def ask(python: str, script: str, arguments: list[str]) -> list[dict]:
    """Runs one side in its own process; returns the measurements that it reports."""
    start = time.perf_counter()
    command = [python, str(FOLDER / script), *arguments]
    environment = os.environ | ({"SMOKE": "1"} if "--smoke" in sys.argv else {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    title = f"{script.removesuffix('.py')} {' '.join(arguments)}"
    print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def options(
    description: str, parts: tuple[str, ...], torch_python: str | None = None
) -> argparse.ArgumentParser:
    """Returns the command-line parser of a comparison, which has several parts."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--torch-python",
        required=torch_python is None,
        default=torch_python,
        help="Python with the requirements",
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--only", choices=parts, help="leave the others out")
    parser.add_argument("--smoke", action="store_true", help="do everything once, in little time")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of all that was measured")
    return parser


def publish(
    header: list[str],
    rows: list[list[str]],
    cases: dict[str, dict[str, Results]],
    output: pathlib.Path | None,
) -> None:
    """Prints the machine, the date and the table; writes all measurements to `output`."""
    print(f"{platform.processor() or platform.machine()}, {time.strftime('%Y-%m-%d')}\n")
    print(table(header, rows))
    if output:
        measured = {
            case: {side: vars(results) for side, results in sides.items()}
            for case, sides in cases.items()
        }
        output.write_text(json.dumps(measured, indent=1))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
