import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from pipeline_fixtures import small_config, write_images

from vqbeam.pipelines.stages.transforms import transform
from vqbeam.vqvae.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow


def test_a_runner_hears_of_images_steps_and_loss(tmp_path):
    write_images(tmp_path / "source", 24)
    run = RunFolder(tmp_path / "run")
    run.start(small_config(f"folder:{tmp_path / 'source'}", vqvae__steps=2, prior__steps=3))
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    runs = pipeline | beam.Create([str(run.root)])
    for stage in ("prepare", "train-vqvae", "encode", "train-prior"):
        runs = runs | stage >> transform(stage, False)
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query(MetricsFilter().with_namespace("vqbeam"))
    counters = {counter.key.metric.name: counter.committed for counter in found["counters"]}
    assert counters == {
        "images_prepared": sum(run.manifest("prepare")["counts"].values()),
        "images_failed": 0,
        "images_encoded": sum(run.manifest("encode")["counts"].values()),
        "train_vqvae_steps": 2,
        "train_prior_steps": 3,
    }
    gauges = {gauge.key.metric.name: gauge.committed.value for gauge in found["gauges"]}
    for stage in ("train-vqvae", "train-prior"):
        loss = run.manifest(stage)["history"][-1]["loss"]
        name = f"{stage.replace('-', '_')}_loss_millionths"
        assert gauges.pop(name) == pytest.approx(1e6 * loss, abs=1)
    assert not gauges
