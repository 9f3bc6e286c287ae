"""How much of the codebook is in use, and how near a reconstruction is to its image."""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from vqbeam.vqvae.layout import CodeLayout


# Saved models have the name that the class had in earlier versions.
@keras.saving.register_keras_serializable("vqbeam", name="CodebookUse")
class CodebookUsage(keras.metrics.Metric):
    """Perplexity of the codes and share of the codebook in use, counted over an epoch.

    Perplexity is the exponential of the entropy in nats of how often each code was chosen: 1 where
    one code does it all, K where all are used alike. It grows with the number of codes counted, so
    the counts run over the whole epoch and not over a batch.

    Args:
        layout: A `CodeLayout`; each level has counts of its own.
    """

    def __init__(self, layout, name="codebook_use", **kwargs):
        super().__init__(name=name, **kwargs)
        self.layout = layout
        self.counts = self.add_weight(
            shape=(layout.levels, layout.num_codes), initializer="zeros", name="counts"
        )

    def update_state(self, codes):
        """Counts codes [B, *layout.shape], int32 in [0, num_codes)."""
        layout = self.layout
        codes = ops.reshape(codes, (-1, layout.length)) + layout.level * layout.num_codes
        codes = ops.reshape(codes, (-1,))
        ones = ops.ones_like(codes, dtype="float32")
        counts = ops.segment_sum(ones, codes, num_segments=layout.levels * layout.num_codes)
        self.counts.assign_add(ops.reshape(counts, self.counts.shape))

    def result(self):
        """Returns `{"perplexity": [1, K], "codes_used": [0, 1]}`, as means over the levels.

        Where there are several, `perplexity_0` and so on are those of each level.
        """
        share = self.counts / ops.maximum(ops.sum(self.counts, axis=1, keepdims=True), 1.0)
        entropy = -ops.sum(share * ops.log(ops.maximum(share, 1e-20)), axis=1)
        used = ops.mean(ops.cast(self.counts > 0, "float32"), axis=1)
        measures = {"perplexity": ops.exp(entropy), "codes_used": used}
        results = {name: ops.mean(values) for name, values in measures.items()}
        if self.layout.levels > 1:
            for level in range(self.layout.levels):
                results |= {f"{name}_{level}": v[level] for name, v in measures.items()}
        return results

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "layout": dataclasses.asdict(self.layout)}

    @classmethod
    def from_config(cls, config):
        """Returns the metric that `get_config` was asked of."""
        return cls(**{**config, "layout": CodeLayout(**config["layout"])})


def count_codes(codes: np.ndarray, layout: CodeLayout) -> np.ndarray:
    """Returns how often each level uses each code, int64 [levels, K], in codes [N, *shape]."""
    rows = codes.reshape(-1, layout.length) + layout.level * layout.num_codes
    counts = np.bincount(rows.ravel(), minlength=layout.levels * layout.num_codes)
    return counts.reshape(layout.levels, layout.num_codes)


def by_level(values: list):
    """Returns the values of all levels, or that of the only one."""
    return values if len(values) > 1 else values[0]


def perplexity(counts: np.ndarray) -> float:
    """Returns the exponential of the entropy in nats of `counts`, [K] non-negative."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def psnr(mse: float) -> float:
    """Returns the peak signal-to-noise ratio in dB for a mean squared error on [0, 255]."""
    return float(10 * np.log10(255.0**2 / mse)) if mse else math.inf


def nmse(mse: float, variance: float) -> float:
    """Returns a squared error in units of the training pixels' variance, both on one scale.

    1 is what the mean level, one for all channels, in place of every number would reach.
    """
    return mse / variance


def ssim(originals: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of images and their copies, float32 [B] in [−1, 1].

    From "Image Quality Assessment: From Error Visibility to Structural Similarity", Wang et al.
    2004 (https://doi.org/10.1109/TIP.2003.819861), equation 13, with the paper's constants and
    Gaussian window, the mean over channels and over the places where the window lies whole in the
    image. It is 11 pixels wide, and narrower in an image that is smaller.

    Args:
        originals: uint8 [B, H, W, C].
        copies: Likewise.
    """
    side = min(11, *originals.shape[1:3])
    width = side - 1 + side % 2  # odd
    return tf.image.ssim(originals, copies, max_val=255, filter_size=width).numpy()


def bits_per_image(num_tokens: int, num_codes: int) -> float:
    """Returns the bits that the codes of an image take, each stored by its number below K."""
    return num_tokens * math.log2(num_codes)


def compression_ratio(image_shape: tuple[int, int, int], bits: float) -> float:
    """Returns how often `bits` go into the 8 bits of each number of an image (H, W, C)."""
    return 8 * math.prod(image_shape) / bits
