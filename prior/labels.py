"""Which labels a prior knows."""

import numpy as np

from vqbeam.configs import VqbeamError
from vqbeam.prior.transformer import CodePrior


def check_labels(model: CodePrior, labels: np.ndarray) -> None:
    """Raises a VqbeamError where labels [N], or attributes [N, A], are none of the prior's."""
    count = model.num_labels
    if model.conditioning == "attributes":
        if labels.shape[1:] != (count,) or not np.isin(labels, (-1, 0, 1)).all():
            raise VqbeamError(
                f"labels of shape {labels.shape} are given, but the prior knows {count} "
                "attributes; give each image a 0 or 1 for each of them, or −1 for none"
            )
        return
    wrong = labels[(labels < -1) | (labels > model.null_label)]
    if wrong.size:
        raise VqbeamError(
            f"label {wrong[0]} is out of range; the prior knows labels 0 to {count - 1}"
            if count
            else f"label {wrong[0]} is given, but the prior was trained without classes; use -1"
        )
