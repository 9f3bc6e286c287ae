import numpy as np
import pytest
from pipeline_fixtures import SIDE, small_config

from vqbeam.configs import SampleConfig
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.devices import compiled_decoder, in_batches


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [dict(vqvae__quantizer="residual", vqvae__depth=2), dict(vqvae__grids=2)]
)
def test_codes_of_several_levels_are_decoded(settings):
    model = build_model(small_config("glyphs", **settings), data_variance=1.0)
    codes = np.random.default_rng(0).integers(12, size=(5, *model.layout.shape), dtype="int32")
    images = in_batches(compiled_decoder(model), codes, batch_size=3)
    assert images.shape == (5, SIDE, SIDE, 3) and images.dtype == np.uint8
    # A compiled decoder may round a pixel in another way.
    assert np.abs(np.asarray(model.decode(codes)).astype(int) - images).max() <= 1


def test_a_batch_is_no_larger_than_what_is_drawn():
    assert SampleConfig(batch_size=64).with_at_most(5) == SampleConfig(batch_size=5)
    assert SampleConfig(batch_size=64).with_at_most(100) == SampleConfig(batch_size=64)
