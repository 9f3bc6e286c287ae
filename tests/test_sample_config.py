import pytest

from vqbeam.configs import SampleConfig, VqbeamError


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"min_p": 1.0}, "sample.min_p is 1.0; it must be below 1"),
        ({"guidance_schedule": "cubic"}, "choose one of constant, linear, cosine, interval"),
        (
            {"guidance_start": 0.5, "guidance_end": 0.5},
            r"sample.guidance_start is 0.5; it must be below sample.guidance_end \(0.5\)",
        ),
        ({"guidance_end": 1.5}, "sample.guidance_end is 1.5; it must be at most 1"),
    ],
)
def test_out_of_range(settings, message):
    with pytest.raises(VqbeamError, match=message):
        SampleConfig(**settings)
