"""The hierarchical VQ-VAE: a coarse grid for global structure and a fine grid for details."""

import keras
from keras import ops

from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.networks import (
    build_coarser,
    build_decoder,
    build_encoder,
    build_finer,
    build_projection,
)
from vqbeam.vqvae.quantizers.base import Quantized


@keras.saving.register_keras_serializable("vqbeam")
class HierarchicalVQVAE(VQVAE):
    """A VQ-VAE with two grids; the top grid has half the rows and columns of the bottom grid.

    From "Generating Diverse High-Fidelity Images with VQ-VAE-2", Razavi et al. 2019
    (https://arxiv.org/abs/1906.00446), algorithm 1. The top codes are computed from the encoder's
    features, and the bottom codes from these features and the decoded top codes. The decoder
    receives both.

    The arguments are those of `VQVAE`. The given quantizer is used for the bottom grid; the top
    grid gets another quantizer with the same settings.

    Raises:
        ValueError: The quantizer has several codes per position, or a side of the bottom grid is
            odd.
    """

    def _layout(self):
        (rows, columns) = super()._layout().grids[0]
        if self.quantizer.levels > 1:
            raise ValueError("two grids of several codes a position are not supported; use one")
        if rows % 2 or columns % 2:
            raise ValueError(f"the bottom grid is {rows}×{columns}; its sides must be even")
        return CodeLayout(self.quantizer.num_codes, ((rows // 2, columns // 2), (rows, columns)))

    def _build_networks(self):
        network = {**self.architecture, "dtype": self.dtype_policy}
        if network.pop("network") != "conv":
            raise ValueError("two grids are supported with network conv only")
        blocks = {name: network[name] for name in ("residual_layers", "residual_width", "dtype")}
        dim, width = self.quantizer.dim, network["width"]
        config = self.quantizer.get_config()
        top_config = {**config, "name": f"top_{config['name']}"}
        self.top_quantizer = type(self.quantizer).from_config(top_config)
        top, bottom = self.layout.grids
        self.encoder = build_encoder(latent_channels=width, **network)
        self.top_encoder = build_coarser((*bottom, width), dim, width, **blocks)
        self.top_decoder = build_finer((*top, dim), dim, width, **blocks)
        self.bottom_projection = build_projection(
            (*bottom, width + dim), dim, dtype=blocks["dtype"]
        )
        self.decoder = build_decoder(latent_channels=2 * dim, **network)
        self._build_quantizer(self.top_quantizer, top)
        self._build_quantizer(self.quantizer, bottom)

    def quantize_images(self, images, training=False) -> Quantized:
        """Quantizes images [B, H, W, C] in [−1, 1]; `quantized` is the input of the decoder."""
        features = self.encoder(images, training=training)
        top = self.top_quantizer(self.top_encoder(features, training=training), training=training)
        coarse = self.top_decoder(top.quantized, training=training)
        bottom = self.quantizer(self._bottom_latents(features, coarse), training=training)
        return Quantized(
            ops.concatenate([coarse, bottom.quantized], axis=-1),
            self.layout.join([top.codes, bottom.codes]),
            _added(top.losses, bottom.losses),
            self._means_over_cells(top.statistics, bottom.statistics),
        )

    def _means_over_cells(self, top, bottom):
        cells = [rows * columns for rows, columns in self.layout.grids]
        share = cells[0] / sum(cells)
        return {name: share * top[name] + (1 - share) * bottom[name] for name in top}

    def latents(self, codes):
        """Returns the decoder's input [B, h, w, 2D] for codes [B, T]."""
        top, bottom = self.layout.split(codes)
        coarse = self.top_decoder(self.top_quantizer.decode_codes(top), training=False)
        return ops.concatenate([coarse, self.quantizer.decode_codes(bottom)], axis=-1)

    def _bottom_latents(self, features, coarse):
        return self.bottom_projection(ops.concatenate([features, coarse], axis=-1))

    def initialize_codebook(self, images, method, seed):
        """Initializes both codebooks before the first step; see `VQVAE.initialize_codebook`."""
        features = self.encoder(images, training=False)
        z = self.top_encoder(features, training=False)
        self.top_quantizer.initialize(self.top_quantizer.as_vectors(z), method, seed)
        coarse = self.top_decoder(self.top_quantizer(z).quantized, training=False)
        z = self._bottom_latents(features, coarse)
        self.quantizer.initialize(self.quantizer.as_vectors(z), method, seed)


def _added(first, second):
    return {name: first[name] + second[name] for name in first}
