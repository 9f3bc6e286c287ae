"""Optimizers (Adam, AdamW, Muon) and learning-rate schedules."""

import math
from typing import Any

import keras
from keras import ops

from vqbeam.configs import PriorConfig, VQVAEConfig
from vqbeam.vqvae.fitting.devices import share_of_replica, sum_over_replicas


def build_optimizer(settings: VQVAEConfig) -> keras.Optimizer:
    """Returns the optimizer of stage 1, including its schedule."""
    options = optimizer_options(settings)
    if settings.optimizer == "adam":
        return Adam(**options)
    # Half the learning rate for Adam: biases, norms, a learned codebook and the smallest kernels.
    return ConvolutionMuon(weight_decay=0.0, adam_weight_decay=0.0, adam_lr_ratio=0.5, **options)


def optimizer_options(settings: VQVAEConfig | PriorConfig) -> dict[str, Any]:
    """Returns the optimizer arguments of both stages: schedule, clipping and weight EMA."""
    schedule = learning_rate(
        settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        kind=settings.schedule,
    )
    return {
        "name": settings.optimizer,
        "learning_rate": schedule,
        "global_clipnorm": settings.clip_norm or None,
        "use_ema": settings.weight_ema > 0,
        "ema_momentum": settings.weight_ema,
    }


class WholeBatchClipping:
    """An optimizer mixin that clips the gradient of the complete batch on several devices.

    On TensorFlow, Keras clips the gradient of each device before summing them.
    """

    def _clip_gradients(self, grads):
        if not self.global_clipnorm:
            return grads
        whole = sum_over_replicas(*[ops.convert_to_tensor(gradient) for gradient in grads])
        # Keras then sums over the replicas.
        return [share_of_replica(gradient) for gradient in super()._clip_gradients(list(whole))]


class WarmAverage:
    """An optimizer mixin that warms up the decay of the weight EMA.

    At step t, counted from 0, the decay is min(`ema_momentum`, t / (t + 9)), so the average covers
    about a tenth of the steps so far. Keras's EMA starts from the weights after the first step,
    whose share of the average is decay^(t - 1): after 1,000 steps with a decay of 0.999, more than
    a third of the average would come from an untrained model.
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
    """Keras's Adam with batch-level clipping and a warmed-up weight EMA."""


@keras.saving.register_keras_serializable("vqbeam")
class AdamW(WholeBatchClipping, WarmAverage, keras.optimizers.AdamW):
    """Keras's AdamW with batch-level clipping and a warmed-up weight EMA."""


@keras.saving.register_keras_serializable("vqbeam")
class Muon(WholeBatchClipping, WarmAverage, keras.optimizers.Muon):
    """Keras's Muon, applied to matrices other than embeddings; AdamW updates all other weights.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a
    weight matrix with the nearest orthogonal matrix, so that a step has equal length in every
    direction.
    """


@keras.saving.register_keras_serializable("vqbeam")
class ConvolutionMuon(Muon):
    """Muon, applied to convolution kernels; Adam updates all other weights.

    A kernel is flattened to a matrix whose columns are its last axis: the output channels, or the
    input channels of a transposed convolution. Kernels with fewer than `smallest` rows or columns
    are updated by Adam.
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


def with_scaled_loss(optimizer: keras.Optimizer, dtype: str) -> keras.Optimizer:
    """Returns the optimizer of a training whose layers have the policy `dtype`.

    With mixed_float16, the loss is scaled so that gradients do not underflow (Micikevicius et al.,
    https://arxiv.org/abs/1710.03740, section 3.2). Keras does this itself only if the model that is
    trained has this policy, and not if its parts have it.
    """
    if dtype == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def learning_rate(peak: float, *, steps: int, warmup_steps: int, kind: str = "cosine"):
    """Returns a learning-rate schedule: linear warm-up, then cosine decay or a constant rate.

    Args:
        peak: The highest learning rate.
        steps: Total number of training steps.
        warmup_steps: Number of steps in which the rate rises from 0.
        kind: "cosine" decays to 1% of the peak (Loshchilov and Hutter 2016,
            https://arxiv.org/abs/1608.03983, eq. 5, one cycle); "constant" stays at the peak.
    """
    warmup = {"warmup_target": peak, "warmup_steps": warmup_steps} if warmup_steps else {}
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else peak,
        max(1, steps - warmup_steps),
        alpha=_FLOOR if kind == "cosine" else 1.0,
        **warmup,
    )
