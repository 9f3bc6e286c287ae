import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that

from vqbeam.pipelines.beam import Gathered, GatherReports
from vqbeam.pipelines.stages import encode, prepare
from vqbeam.pipelines.stages.shards import ShardReport
from vqbeam.vqvae.storage.records import Shard


def reports_of(*facts):
    return [
        ShardReport(Shard("images", "train", index, len(facts)), "", index, 10 * index, one)
        for index, one in enumerate(facts)
    ]


def code_facts(seed):
    counts = np.random.default_rng(seed).integers(0, 1000, (2, 5))
    return {"code_counts": counts.tolist()}


def image_facts(seed):
    numbers = np.random.default_rng(seed)
    names = ("pixels", "pixel_sum", "square_sum")
    sums = {name: int(numbers.integers(1, 2**40)) for name in names}
    labels = {str(label): int(numbers.integers(1, 9)) for label in numbers.integers(0, 4, 2)}
    failures = [{"key": f"{seed}.png", "reason": "truncated file"}] * (seed % 2)
    return {
        "failures": failures,
        "labels": [["a", "b", "c", "d"], "classes"],
        "statistics": sums | {"labels": labels},
    }


def combined(add, parts):
    """Gathers reports as workers would: each adds up its own part, and one the sums."""
    combine, sums = GatherReports(add), []
    for part in parts:
        gathered = combine.create_accumulator()
        for report in part:
            gathered = combine.add_input(gathered, report)
        sums.append(gathered)
    return combine.extract_output(combine.merge_accumulators(sums))


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 1, 1, 1, 1, 1), (0, 3, 0, 3)])
def test_counts_of_codes_are_summed_however_shards_are_divided(sizes):
    reports = reports_of(*map(code_facts, range(6)))
    bounds = np.cumsum((0, *sizes))
    parts = [reports[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]
    found = combined(encode.add_facts, parts)
    expected = np.sum([code_facts(seed)["code_counts"] for seed in range(6)], axis=0)
    np.testing.assert_array_equal(found.facts["code_counts"], expected)
    assert [report.shard for report in found.reports] == [report.shard for report in reports]
    assert [report.bytes for report in found.reports] == [0, 10, 20, 30, 40, 50]
    # What a report has seen does not travel with it.
    assert not any(report.facts for report in found.reports)
    assert all(report.facts for report in reports)


def test_what_was_seen_in_images_is_summed_in_any_order():
    reports = reports_of(*map(image_facts, range(5)))
    one = combined(prepare.add_facts, [reports[:2], reports[2:]]).facts
    other = combined(prepare.add_facts, [reports[:1:-1], reports[1::-1]]).facts
    seen = [image_facts(seed) for seed in range(5)]
    for facts in (one, other):
        for name in ("pixels", "pixel_sum", "square_sum"):
            assert facts["statistics"][name] == sum(f["statistics"][name] for f in seen)
        for label in "0123":
            counts = [f["statistics"]["labels"].get(label, 0) for f in seen]
            assert facts["statistics"]["labels"].get(label, 0) == sum(counts)
        assert sorted(failure["key"] for failure in facts["failures"]) == ["1.png", "3.png"]
        assert facts["labels"] == seen[0]["labels"]
    # The reports are as they were: a runner may give them once more.
    assert [report.facts for report in reports] == seen


def test_one_shard_is_as_it_is():
    (report,) = reports_of(image_facts(1))
    assert combined(prepare.add_facts, [[report]]).facts == image_facts(1)


def test_in_a_pipeline():
    reports = reports_of(*map(code_facts, range(20)))
    expected = np.sum([code_facts(seed)["code_counts"] for seed in range(20)], axis=0)

    def check(found):
        ((run, gathered),) = found
        assert run == "run" and isinstance(gathered, Gathered)
        np.testing.assert_array_equal(gathered.facts["code_counts"], expected)
        assert sorted(report.shard.index for report in gathered.reports) == list(range(20))

    with TestPipeline() as pipeline:
        gathered = (
            pipeline
            | beam.Create([("run", report) for report in reports])
            | beam.Reshuffle()
            | beam.CombinePerKey(GatherReports(encode.add_facts))
        )
        assert_that(gathered, check)
