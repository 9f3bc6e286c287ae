import collections

import numpy as np
import pytest
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from PIL import Image

from vqbeam.pipelines.sources import glyphs


class FewGlyphs(glyphs.Glyphs):
    """As many glyphs as a test has time for."""

    COUNTS = {"train": 52, "test": 26}


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    builder = FewGlyphs(data_dir=str(tmp_path_factory.mktemp("glyphs")))
    options = PipelineOptions(["--runner=FnApiRunner"])
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(beam_options=options, try_download_gcs=False)
    )
    return builder


def _gray(image):
    return image @ np.array([0.299, 0.587, 0.114])


def test_glyph_is_an_image_with_a_label():
    for index in range(52):
        image, label = glyphs.draw_glyph(0, index)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert label == index % 26


def test_glyph_depends_on_seed_and_index_alone():
    forwards = [glyphs.draw_glyph(3, index)[0] for index in range(60)]
    glyphs._letter_mask.cache_clear()
    backwards = [glyphs.draw_glyph(3, index)[0] for index in reversed(range(60))]
    np.testing.assert_array_equal(forwards, backwards[::-1])
    assert len({image.tobytes() for image in forwards}) == 60
    assert (glyphs.draw_glyph(4, 0)[0] != forwards[0]).any()


@pytest.mark.parametrize("font", glyphs.FONTS)
def test_font_has_26_different_letters(font):
    masks = [glyphs._letter_mask(font, letter) for letter in glyphs.LETTERS]
    assert len({(mask.size, mask.tobytes()) for mask in masks}) == 26


def test_ink_stands_out_from_the_background():
    for index in range(260):
        gray = _gray(glyphs.draw_glyph(0, index)[0])
        # Thin strokes do not reach the full colour of the ink.
        assert np.ptp(gray) > 60


def test_letter_is_whole():
    for index in range(260):
        image = glyphs.draw_glyph(0, index)[0].astype(int)
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        np.testing.assert_array_equal(corners, corners[[0, 0, 0, 0]])


def test_letters_can_be_told_apart():
    shapes = np.array([_shape(index) for index in range(50 * 26)])
    templates = shapes[: 40 * 26].reshape(40, 26, -1).mean(axis=0)
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    guesses = (shapes[40 * 26 :] @ templates.T).argmax(axis=1)
    assert np.mean(guesses == np.arange(10 * 26) % 26) > 0.8


def _shape(index):
    """The ink of a glyph, cut to its edges so that size and place tell nothing, norm 1."""
    gray = _gray(glyphs.draw_glyph(0, index)[0])
    ink = np.abs(gray - gray[0, 0])
    rows, columns = np.nonzero(ink > 0.3 * ink.max())
    letter = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    shape = np.asarray(Image.fromarray(letter.astype(np.float32)).resize((16, 16))).ravel()
    return shape / np.linalg.norm(shape)


@pytest.mark.slow
def test_splits_are_balanced(builder):
    assert builder.info.features["label"].names == list(glyphs.LETTERS)
    for split, count in FewGlyphs.COUNTS.items():
        assert builder.info.splits[split].num_examples == count
        labels = [int(e["label"]) for e in tfds.as_numpy(builder.as_dataset(split=split))]
        assert collections.Counter(labels) == dict.fromkeys(range(26), count // 26)


def test_full_size_is_balanced():
    assert all(count % 26 == 0 for count in glyphs.Glyphs.COUNTS.values())


@pytest.mark.slow
def test_records_hold_what_draw_glyph_draws(builder):
    starts = {"train": 0, "test": 52}
    for split, count in FewGlyphs.COUNTS.items():
        indices = range(starts[split], starts[split] + count)
        drawn = [glyphs.draw_glyph(FewGlyphs.SEED, index) for index in indices]
        expected = {image.tobytes(): label for image, label in drawn}
        examples = tfds.as_numpy(builder.as_dataset(split=split))
        read = {example["image"].tobytes(): int(example["label"]) for example in examples}
        assert read == expected
