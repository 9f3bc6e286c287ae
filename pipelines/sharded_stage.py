"""What stages that write a dataset have in common: work by shards, whose reports become one."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import apache_beam as beam

from vqbeam.pipelines.shards import ShardReport
from vqbeam.vqvae.storage.run_folder import RunFolder


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
        seen = [one for one in facts if one is not None]
        return functools.reduce(self.add, seen) if seen else None


class ShardedStage(beam.PTransform):
    """From the path of a run to the same path, once a stage has written all shards of its dataset.

    Shards are shuffled as units of work, never as pixels: each is read and written by one worker.

    Args:
        stage: Its name.
        plan: From the path of a run to `(path, unit)` for each shard; it begins the stage.
        write: From these two to `(path, report)`, once the shard is written.
        add: See `GatherReports`.
        finish: From the path and what was gathered to the path, once the stage is finished.
    """

    def __init__(
        self, stage: str, *, plan: Callable, write: Callable, add: Callable, finish: Callable
    ):
        super().__init__()
        self.stage, self.plan, self.write, self.add, self.finish = stage, plan, write, add, finish

    def expand(self, runs):
        """Builds the steps."""
        pending, done = runs | "IsDone" >> beam.Partition(_is_done, 2, self.stage)
        finished = (
            pending
            | "Plan" >> beam.FlatMap(self.plan)
            | beam.Reshuffle()
            | "WriteShard" >> beam.MapTuple(self.write)
            | "GatherReports" >> beam.CombinePerKey(GatherReports(self.add))
            | "Finish" >> beam.MapTuple(self.finish)
        )
        return (done, finished) | beam.Flatten()


def _is_done(run_path: str, parts: int, stage: str) -> int:
    """Returns 1 for a run whose stage has ended: an engine may start a job anew, from its begin."""
    return int(RunFolder(run_path).is_done(stage))
