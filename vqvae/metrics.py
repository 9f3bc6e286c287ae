"""How much of the codebook is in use, and how near a reconstruction is to its image."""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("vqbeam")
class CodebookUse(keras.metrics.Metric):
    """Perplexity of the codes and share of the codebook in use, counted over an epoch.

    Perplexity is the exponential of the entropy in nats of how often each code was chosen: 1 where
    one code does it all, K where all are used alike. It grows with the number of codes counted, so
    the counts run over the whole epoch and not over a batch.

    Args:
        num_codes: Codebook size K.
    """

    def __init__(self, num_codes, name="codebook_use", **kwargs):
        super().__init__(name=name, **kwargs)
        self.num_codes = num_codes
        self.counts = self.add_weight(shape=(num_codes,), initializer="zeros", name="counts")

    def update_state(self, codes):
        """Counts codes of any shape, int32 in [0, num_codes)."""
        codes = ops.reshape(codes, (-1,))
        ones = ops.ones_like(codes, dtype="float32")
        counts = ops.segment_sum(ones, codes, num_segments=self.num_codes)
        self.counts.assign_add(counts)

    def result(self):
        """Returns `{"perplexity": [1, K], "codes_used": [0, 1]}`."""
        share = self.counts / ops.maximum(ops.sum(self.counts), 1.0)
        entropy = -ops.sum(share * ops.log(ops.maximum(share, 1e-20)))
        used = ops.mean(ops.cast(self.counts > 0, "float32"))
        return {"perplexity": ops.exp(entropy), "codes_used": used}

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_codes": self.num_codes}


def perplexity(counts: np.ndarray) -> float:
    """Returns the exponential of the entropy in nats of `counts`, [K] non-negative."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def psnr(mse: float) -> float:
    """Returns the peak signal-to-noise ratio in dB for a mean squared error on [0, 255]."""
    return float(10 * np.log10(255.0**2 / mse))
