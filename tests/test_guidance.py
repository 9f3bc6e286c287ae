import numpy as np
import pytest

from vqbeam.configs import SampleConfig
from vqbeam.prior.filters import guidance_scales


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [3, 3, 3, 3, 3]),
        ({"guidance_schedule": "linear"}, [1, 1.5, 2, 2.5, 3]),
        # Half-way up at the middle, and (1 - cos(π / 4)) / 2 of the way at a quarter.
        ({"guidance_schedule": "cosine"}, [1, 1.2928932, 2, 2.7071068, 3]),
        # π (1/2)² is π / 4, and so on.
        (
            {"guidance_schedule": "cosine", "guidance_power": 2.0},
            [1, 1.0192147, 1.2928932, 2.1950903, 3],
        ),
        ({"guidance_schedule": "interval"}, [3, 3, 3, 3, 3]),
        (
            {"guidance_schedule": "interval", "guidance_start": 0.2, "guidance_end": 0.8},
            [1, 3, 3, 3, 1],
        ),
        ({"guidance_schedule": "interval", "guidance_start": 0.5}, [1, 1, 1, 3, 3]),
        # The ends belong to the interval alone.
        ({"guidance_start": 0.5}, [3, 3, 3, 3, 3]),
    ],
)
def test_scales(settings, expected):
    scales = guidance_scales(SampleConfig(guidance=3, **settings), 5)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "interval"])
def test_one_code_alone_and_no_guidance(schedule):
    settings = SampleConfig(guidance=3, guidance_schedule=schedule)
    assert guidance_scales(settings, 1).tolist() == [3]
    none = SampleConfig(guidance=1, guidance_schedule=schedule)
    assert guidance_scales(none, 7).tolist() == [1] * 7
