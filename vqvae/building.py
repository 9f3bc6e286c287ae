"""Builds an untrained VQ-VAE from a run's config."""

from vqbeam.configs import Config, VQVAEConfig
from vqbeam.vqvae.fitting.fit import set_seed
from vqbeam.vqvae.hierarchy import HierarchicalVQVAE
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.base import Quantizer
from vqbeam.vqvae.quantizers.fsq import FiniteScalarQuantizer
from vqbeam.vqvae.quantizers.lfq import LookupFreeQuantizer
from vqbeam.vqvae.quantizers.predictive import PredictiveQuantizer
from vqbeam.vqvae.quantizers.residual import ResidualQuantizer
from vqbeam.vqvae.quantizers.simvq import SimVQ
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

# Keras would number the layers of a process, and the file of a model would depend on what else was
# built before, such as the model of a trial.
_NAME = "quantizer"


def build_model(config: Config, *, data_variance: float) -> VQVAE:
    """Returns an untrained, built VQ-VAE; sets the global random seeds.

    Args:
        config: The run's config.
        data_variance: Variance of the training pixels, scaled to [−1, 1].
    """
    set_seed(config.seed)
    settings = config.vqvae
    kind = VQVAE if settings.grids == 1 else HierarchicalVQVAE
    return kind(
        image_shape=config.image_shape,
        quantizer=build_quantizer(settings),
        downsampling=settings.downsampling,
        network=settings.network,
        width=settings.width,
        residual_layers=settings.residual_layers,
        residual_width=settings.residual_width,
        data_variance=data_variance,
        dtype=settings.dtype,
        name="vqvae",
    )


def build_quantizer(settings: VQVAEConfig) -> Quantizer:
    """Returns the quantizer for the settings."""
    rest = {"commitment": settings.commitment, "entropy": settings.entropy, "name": _NAME}
    lookup = {"lookup": settings.lookup, "estimator": settings.estimator}
    codebook = {
        "update": settings.codebook_update,
        "decay": settings.ema_decay,
        "restart_below": settings.restart_below,
        "balance": settings.balance,
    }
    size = (settings.num_codes, settings.code_dim)
    match settings.quantizer:
        case "vector":
            return VectorQuantizer(*size, **lookup, **codebook, **rest)
        case "predictive":
            return PredictiveQuantizer(*size, **lookup, **codebook, **rest)
        case "residual":
            return ResidualQuantizer(settings.depth, *size, **lookup, **codebook, **rest)
        case "simvq":
            return SimVQ(*size, **lookup, **rest)
        case "fsq":
            return FiniteScalarQuantizer(settings.fsq_sizes, name=_NAME)
        case "lfq":
            return LookupFreeQuantizer(settings.num_codes.bit_length() - 1, **rest)
    raise ValueError(settings.quantizer)
