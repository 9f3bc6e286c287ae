import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from vqbeam.configs import SampleConfig
from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.stage_commands import STAGES
from vqbeam.pipelines.stages.encode import EncodeStage
from vqbeam.pipelines.stages.generate import GenerateImages, GenerateJob
from vqbeam.pipelines.stages.transforms import GPU_HINTS, transform
from vqbeam.vqvae.storage import run_folder

JOB = GenerateJob("r", "o", "png", None, 3, 4, SampleConfig(num=9), "small", "0123")


def hints_of_steps(gpu_hint):
    """Returns the resource hints of every step, by its full name, as a runner is told them."""
    options = PipelineOptions(["--runner=FnApiRunner"])
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=options)
    runs = pipeline | beam.Create(["run"])
    for stage in STAGES:
        runs = runs | stage >> transform(stage, gpu_hint)
    return hints_of(pipeline)


def hints_of(pipeline):
    components = pipeline.to_runner_api().components
    return {
        step.unique_name: dict(components.environments[step.environment_id].resource_hints)
        for step in components.transforms.values()
        if step.environment_id
    }


def test_only_training_asks_for_a_gpu():
    steps = hints_of_steps(gpu_hint=True)
    hinted = {name for name, hints in steps.items() if hints}
    assert {name.partition("/")[0] for name in hinted} == {"train-vqvae", "train-prior"}
    for name in hinted:
        assert steps[name]["beam:resources:accelerator:v1"] == GPU_HINTS["accelerator"].encode()
        assert steps[name]["beam:resources:min_ram_bytes:v1"] == b"16000000000"
    first = {name.partition("/")[0] for name in steps}
    assert set(STAGES) <= first


def test_nothing_is_asked_of_other_runners():
    # Each distinct hint would cost a set of worker processes.
    assert not any(hints_of_steps(gpu_hint=False).values())


@pytest.mark.parametrize(
    ("words", "transform", "step"),
    [
        ("encode cifar10 --run-dir gs://b/r", EncodeStage(), "EncodeStage/WriteShard"),
        ("generate gs://b/r --num 9 --output gs://b/o", GenerateImages(JOB), "GenerateShard"),
    ],
)
def test_a_flag_of_beam_asks_for_a_gpu(words, transform, step):
    words = [*words.split(), "--runner=DataflowRunner"]
    for name, value in GPU_HINTS.items():
        words += ["--resource_hint", f"{name}={value}"]
    beam_args = parse(words)[1]["beam_args"]
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(beam_args))
    pipeline | transform if "Generate" in step else pipeline | beam.Create(["run"]) | transform
    hints = hints_of(pipeline)
    (name,) = [name for name in hints if name.endswith(step)]
    assert hints[name]["beam:resources:accelerator:v1"] == GPU_HINTS["accelerator"].encode()
    assert hints[name]["beam:resources:min_ram_bytes:v1"] == b"16000000000"


def test_every_stage_of_a_run_has_a_transform():
    assert tuple(run_folder.STAGES) == STAGES
    with pytest.raises(ValueError, match="smaple"):
        transform("smaple", False)
