"""The reports of a dataset's shards as one, added up on their way to the worker that ends it."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import apache_beam as beam

from pipelines.shards import ShardReport


class Gathered(NamedTuple):
    """What became of some shards of a dataset, or of all.

    Attributes:
        reports: One of each shard, without what was seen in it, in any order.
        facts: What was seen in all of them together; None of no shard.
    """

    reports: list[ShardReport]
    facts: dict[str, Any] | None


class GatherReports(beam.CombineFn):
    """From reports of shards to `Gathered`.

    Each worker adds up what it has seen, so that what meets in one of them at the end grows with
    the number of shards by a line each, however much is seen in a shard.

    Args:
        add: Makes one dictionary of facts out of two, in whatever order they come.
    """

    def __init__(self, add: Callable[[dict, dict], dict]):
        self.add = add

    def create_accumulator(self) -> Gathered:
        """Returns what there is before the first report."""
        return Gathered([], None)

    def add_input(self, gathered: Gathered, report: ShardReport) -> Gathered:
        """Adds a report."""
        gathered.reports.append(dataclasses.replace(report, facts={}))
        return Gathered(gathered.reports, self._sum([gathered.facts, report.facts]))

    def merge_accumulators(self, parts: Iterable[Gathered]) -> Gathered:
        """Adds what several workers have gathered."""
        parts = list(parts)
        reports = [report for part in parts for report in part.reports]
        return Gathered(reports, self._sum([part.facts for part in parts]))

    def extract_output(self, gathered: Gathered) -> Gathered:
        """Returns the sum as it is."""
        return gathered

    def _sum(self, facts: list[dict | None]) -> dict | None:
        total = None
        for one in facts:
            total = one if total is None else total if one is None else self.add(total, one)
        return total
