"""How strongly each code of an image is guided towards its class."""

import numpy as np

from vqbeam.configs import SampleConfig


def guidance_scales(settings: SampleConfig, length: int) -> np.ndarray:
    """Returns the scale of classifier-free guidance at each position of a sequence of codes.

    "constant" is the scale s everywhere. "linear" goes from 1, no guidance, at the first position
    to s at the last: 1 + (s - 1) p / (T - 1). "interval" is s at those positions p whose share
    p / T lies in [start, end), and 1 elsewhere.

    Args:
        settings: Its `guidance`, `guidance_schedule`, `guidance_start` and `guidance_end` count.
        length: Codes T of an image.

    Returns:
        float32 [T].
    """
    scale = settings.guidance
    if settings.guidance_schedule == "linear":
        # One code alone is the last.
        return np.linspace(scale, 1, length, dtype="float32")[::-1]
    scales = np.full(length, scale, "float32")
    if settings.guidance_schedule == "interval":
        shares = np.arange(length) / length
        inside = (settings.guidance_start <= shares) & (shares < settings.guidance_end)
        return np.where(inside, scales, np.float32(1))
    return scales
