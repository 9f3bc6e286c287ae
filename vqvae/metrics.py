"""Metrics of codebook usage, reconstruction quality and compression."""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from vqbeam.vqvae.layout import CodeLayout


# Saved models refer to the class by its name in earlier versions.
@keras.saving.register_keras_serializable("vqbeam", name="CodebookUse")
class CodebookUsage(keras.metrics.Metric):
    """A metric of the perplexity of the codes and the fraction of the codebook in use.

    Perplexity is the exponential of the entropy, in nats, of the code frequencies: 1 if a single
    code is used, K if all are used equally. It increases with the number of codes counted, so
    counts are accumulated over the epoch instead of averaging over batches.

    Args:
        layout: A `CodeLayout`; each level is counted separately.
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
        """Returns a dictionary with `perplexity` in [1, K] and `codes_used` in [0, 1].

        Both are means over the levels. If there are several levels, `perplexity_0`,
        `codes_used_0` and so on give the values of each level.
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
        """Returns a metric from the output of `get_config`."""
        return cls(**{**config, "layout": CodeLayout(**config["layout"])})


def count_codes(codes: np.ndarray, layout: CodeLayout) -> np.ndarray:
    """Returns the counts of each code per level, int64 [levels, K], for codes [N, *shape]."""
    rows = codes.reshape(-1, layout.length) + layout.level * layout.num_codes
    counts = np.bincount(rows.ravel(), minlength=layout.levels * layout.num_codes)
    return counts.reshape(layout.levels, layout.num_codes)


def by_level(values: list):
    """Returns the list of values per level, or the value itself if there is only one level."""
    return values if len(values) > 1 else values[0]


def perplexity(counts: np.ndarray) -> float:
    """Returns the exponential of the entropy, in nats, of non-negative counts [K]."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def psnr(mse: float) -> float:
    """Returns the peak signal-to-noise ratio in dB for an MSE of pixels in [0, 255]."""
    return float(10 * np.log10(255.0**2 / mse)) if mse else math.inf


def nmse(mse: float, variance: float) -> float:
    """Returns an MSE divided by the variance of the training pixels, both on the same scale.

    A value of 1 corresponds to predicting the mean of all training pixels everywhere.
    """
    return mse / variance


def ssim(originals: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Returns the structural similarity (SSIM) of image pairs, float32 [B] in [−1, 1].

    From "Image Quality Assessment: From Error Visibility to Structural Similarity", Wang et al.
    2004 (https://doi.org/10.1109/TIP.2003.819861), equation 13, with the paper's constants and
    Gaussian window, averaged over channels and over all positions where the window lies inside the
    image. The window is 11 pixels wide, or less for smaller images.

    Args:
        originals: uint8 [B, H, W, C].
        copies: uint8 [B, H, W, C].
    """
    side = min(11, *originals.shape[1:3])
    width = side - 1 + side % 2  # odd
    return tf.image.ssim(originals, copies, max_val=255, filter_size=width).numpy()


def bits_per_image(num_tokens: int, num_codes: int) -> float:
    """Returns the number of bits for the codes of an image, at log2(K) bits per code."""
    return num_tokens * math.log2(num_codes)


def compression_ratio(image_shape: tuple[int, int, int], bits: float) -> float:
    """Returns the size of a uint8 image (H, W, C) in bits, divided by `bits`."""
    return 8 * math.prod(image_shape) / bits
