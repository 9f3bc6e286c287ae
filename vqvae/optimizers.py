"""The optimizers: Adam, AdamW, and Muon for the kernels of convolutions."""

import math
from typing import Any

import keras
from keras import ops

from configs import PriorConfig, VQVAEConfig
from vqvae.quantizers.replicas import share_of_replica, sum_over_replicas
from vqvae.schedules import learning_rate


def build_optimizer(settings: VQVAEConfig) -> keras.Optimizer:
    """Returns the optimizer of stage 1 that the settings name, with its schedule."""
    options = optimizer_options(settings)
    if settings.optimizer == "adam":
        return Adam(**options)
    # Half the rate for Adam's share: biases, norms, the codebook, and what touches the pixels.
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


@keras.saving.register_keras_serializable("vqbeam")
class Adam(WholeBatchClipping, keras.optimizers.Adam):
    """Keras's Adam, for several devices as well."""


@keras.saving.register_keras_serializable("vqbeam")
class AdamW(WholeBatchClipping, keras.optimizers.AdamW):
    """Keras's AdamW, for several devices as well."""


@keras.saving.register_keras_serializable("vqbeam")
class ConvolutionMuon(WholeBatchClipping, keras.optimizers.Muon):
    """Keras's Muon, which leaves all but matrices to Adam, for kernels of convolutions as well.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) turns the momentum of a
    weight matrix into the nearest orthogonal one, so that a step is as long in every direction. A
    kernel is taken as the matrix from its patches to its output channels. Kernels with fewer than
    `smallest` rows or columns, those next to the pixels among them, are left to Adam.
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
