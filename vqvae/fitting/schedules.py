"""Learning rates over the course of training."""

import keras

_FLOOR = 0.01


def learning_rate(peak: float, *, steps: int, warmup_steps: int, kind: str = "cosine"):
    """Returns a learning rate that warms up linearly and then falls as a half cosine, or stays.

    Args:
        peak: The highest value.
        steps: Training steps in all.
        warmup_steps: Steps in which it rises from 0.
        kind: "cosine" falls to a hundredth of the peak (Loshchilov and Hutter 2016,
            https://arxiv.org/abs/1608.03983, eq. 5, one cycle); "constant" stays.
    """
    warmup = {"warmup_target": peak, "warmup_steps": warmup_steps} if warmup_steps else {}
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else peak,
        max(1, steps - warmup_steps),
        alpha=_FLOOR if kind == "cosine" else 1.0,
        **warmup,
    )
