import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that
from pipeline_fixtures import TWO_THREADS, finish_again, png, read_records

import vqbeam
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.errors import user_message
from vqbeam.pipelines.sources.images import decode_image

pytestmark = pytest.mark.slow


def run_with(elements, transform, check, *flags):
    """Runs a transform over elements in a pipeline, and a check over the list of its results."""
    options = PipelineOptions(["--runner=FnApiRunner", *flags])
    with test_pipeline.TestPipeline(options=options) as pipeline:
        assert_that(pipeline | beam.Create(elements) | beam.Reshuffle() | transform, check)


def refusal(elements, transform):
    with pytest.raises(Exception) as caught:
        run_with(elements, transform, lambda found: None)
    return user_message(caught.value)


@pytest.fixture
def pixels(finished_run):
    """The prepared images of a run, by key."""
    records = read_records(finished_run.folder("prepare"))
    return {e["key"].decode(): e["image"] for some in records.values() for e in some}


@pytest.mark.parametrize("flags", [(), TWO_THREADS])
def test_codes_are_those_of_the_stage(finished_run, pixels, flags):
    stage = {
        e["key"].decode(): e["codes"].tolist()
        for some in read_records(finished_run.folder("encode")).values()
        for e in some
    }
    assert len(stage) == 24

    def check(found):
        assert {key: codes.tolist() for key, codes in found} == stage
        assert len(found) == 24 and all(codes.dtype == np.int32 for _, codes in found)

    transform = vqbeam.EncodeImages(finished_run.root)
    assert transform.model == finished_run.result_hash("train-vqvae")
    # Files and pixels in turn.
    given = [(k, png(v) if i % 2 else v) for i, (k, v) in enumerate(pixels.items())]
    run_with(given, transform, check, *flags)


def test_images_of_any_size(finished_run, pixels):
    large = {key: np.kron(image, np.ones((2, 2, 1), np.uint8)) for key, image in pixels.items()}
    config = finished_run.load_config()
    shaped = [
        decode_image(i, height=8, width=8, channels=3, fit=config.data.fit) for i in large.values()
    ]
    wanted = vqbeam.open(finished_run.root).encode(np.stack(shaped))

    def check(found):
        codes = dict(found)
        np.testing.assert_array_equal([codes[key] for key in large], wanted)

    run_with(list(large.items()), vqbeam.EncodeImages(finished_run.root), check)


def test_an_image_that_is_none(finished_run):
    said = refusal([(("any", 3), b"text")], vqbeam.EncodeImages(finished_run.root))
    assert said.startswith("image ('any', 3) cannot be encoded: ") and "\n" not in said


def test_the_models_are_pinned(own_run, pixels):
    run, _ = own_run
    encode, sample = vqbeam.EncodeImages(run.root), vqbeam.SampleImages(run.root)
    sample.checkpoint = "0" * 16
    said = refusal([(0, None)], sample)
    assert "was trained again while images were sampled from it; build the transform" in said
    before = run.result_hash("train-vqvae")[:16]
    finish_again(run, "train-vqvae", measures={"loss": 0.0})
    said = refusal(list(pixels.items())[:1], encode)
    after = run.result_hash("train-vqvae")[:16]
    assert f"is {after} and no longer {before}; it was trained again meanwhile" in said


def test_images_are_those_of_sample(finished_run):
    run = vqbeam.open(finished_run.root)
    # With so much guidance, the class decides, however short the training was.
    settings = dict(seed=4, temperature=0.8, guidance=100.0)
    wanted = run.sample(7, ["apple", "cherry"], **settings).images
    assert not (wanted == run.sample(7, ["cherry", "apple"], **settings).images).all()
    labels = ["apple", "cherry"] * 4
    transform = vqbeam.SampleImages(finished_run.root, **settings)
    assert transform.checkpoint == run.checkpoint
    for numbers in ((0, 1, 2, 3, 4, 5, 6), (5,), (6, 1)):

        def check(found, numbers=numbers):
            images = dict(found)
            assert sorted(images) == sorted(numbers) and len(found) == len(numbers)
            for number in numbers:
                np.testing.assert_array_equal(images[number], wanted[number])

        run_with([(number, labels[number]) for number in numbers], transform, check)


def test_refusals(finished_run, prepared_run, tiny_config):
    with pytest.raises(VqbeamError, match="temperature is -1"):
        vqbeam.SampleImages(finished_run.root, temperature=-1)
    assert "has no label 'pear'" in refusal([(0, "pear")], vqbeam.SampleImages(finished_run.root))
    said = refusal([(0, "apple"), (0, "cherry")], vqbeam.SampleImages(finished_run.root))
    assert "two elements have the number 0; give each a number of its own" in said
    run, _ = prepared_run(tiny_config())
    with pytest.raises(VqbeamError, match="has no finished train-vqvae stage"):
        vqbeam.EncodeImages(run.root)
