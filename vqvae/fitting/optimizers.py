"""The optimizers: Adam, AdamW, and Muon for the kernels of convolutions."""

import math
from typing import Any

import keras
from keras import ops

from vqbeam.configs import PriorConfig, VQVAEConfig
from vqbeam.vqvae.fitting.devices import share_of_replica, sum_over_replicas


def build_optimizer(settings: VQVAEConfig) -> keras.Optimizer:
    """Returns the optimizer of stage 1 that the settings name, with its schedule."""
    options = optimizer_options(settings)
    if settings.optimizer == "adam":
        return Adam(**options)
    # Half the rate for Adam's share: biases, norms, a learned codebook, and the smallest kernels.
    return ConvolutionMuon(weight_decay=0.0, adam_weight_decay=0.0, adam_lr_ratio=0.5, **options)


def optimizer_options(settings: VQVAEConfig | PriorConfig) -> dict[str, Any]:
    """Returns what the optimizers of both stages are given: schedule, clipping and average."""
    schedule = learning_rate(
        settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        kind=settings.schedule,
    )
    return {
        "learning_rate": schedule,
        "global_clipnorm": settings.clip_norm or None,
        "use_ema": settings.weight_ema > 0,
        "ema_momentum": settings.weight_ema,
    }


class WholeBatchClipping:
    """Clips the gradient of the whole batch on several devices too.

    Keras clips the share of each device on TensorFlow, before they add up.
    """

    def _clip_gradients(self, grads):
        if not self.global_clipnorm:
            return grads
        whole = sum_over_replicas(*[ops.convert_to_tensor(gradient) for gradient in grads])
        # Keras then adds up over the replicas.
        return [share_of_replica(gradient) for gradient in super()._clip_gradients(list(whole))]


class WarmAverage:
    """Averages the weights over a tenth of the steps so far, until the decay is reached.

    At step t, from 0 up, the decay is min(`ema_momentum`, t / (t + 9)). Keras's average starts with
    the weights of the first step, of which it keeps a share of decay^(t - 1): after 1,000 steps
    with 0.999 more than a third of it would be an untrained model.
    """

    def _update_model_variables_moving_average(self, trainable_variables):
        if not self.use_ema:
            return
        steps = ops.cast(self.iterations, "float32")
        decay = ops.minimum(self.ema_momentum, steps / (steps + 9.0))
        averages = self._model_variables_moving_average
        for variable, average in zip(trainable_variables, averages, strict=True):
            if average is not None:
                kept = ops.cast(decay, average.dtype)
                average.assign(kept * average + (1 - kept) * ops.cast(variable, average.dtype))


@keras.saving.register_keras_serializable("vqbeam")
class Adam(WholeBatchClipping, WarmAverage, keras.optimizers.Adam):
    """Keras's Adam, for several devices as well."""


@keras.saving.register_keras_serializable("vqbeam")
class AdamW(WholeBatchClipping, WarmAverage, keras.optimizers.AdamW):
    """Keras's AdamW, for several devices as well."""


@keras.saving.register_keras_serializable("vqbeam")
class ConvolutionMuon(WholeBatchClipping, WarmAverage, keras.optimizers.Muon):
    """Keras's Muon, which leaves all but matrices to Adam, for kernels of convolutions as well.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) turns the momentum of a
    weight matrix into the nearest orthogonal one, so that a step is as long in every direction. A
    kernel is taken as the matrix from its patches to its last axis: the output channels, or of a
    transposed convolution the input channels. Kernels with fewer than `smallest` rows or columns
    are left to Adam.
    """

    smallest = 16

    def _should_use_adamw(self, variable):
        rows, columns = _matrix_shape(variable)
        return len(variable.shape) != 4 or min(rows, columns) < self.smallest

    def _muon_update_step(self, gradient, variable, lr, m):
        self.assign_add(m, gradient + m * (self.momentum - 1))
        direction = gradient + self.momentum * m if self.nesterov else m
        matrix = ops.reshape(direction, _matrix_shape(variable))
        update = self.lr_adjust(lr * self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
        self.assign_sub(variable, ops.reshape(update, variable.shape))


def _matrix_shape(variable):
    return math.prod(variable.shape[:-1]), variable.shape[-1] if variable.shape else 1


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
