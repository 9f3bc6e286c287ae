"""The VQ-VAE: encoder, quantizer and decoder as one Keras model."""

import keras
from keras import ops

from vqbeam.vqvae import networks, resnet
from vqbeam.vqvae.fitting.devices import share_of_replica
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.metrics import CodebookUsage
from vqbeam.vqvae.quantizers.base import Quantized


@keras.saving.register_keras_serializable("vqbeam")
class VQVAE(keras.Model):
    """A VQ-VAE, which encodes images as grids of codes and decodes such grids.

    The loss follows van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937), equation 3. The
    reconstruction error is divided by the variance of the data, so that the same β suits datasets
    of any contrast:

        ‖x − x̂‖² / variance + the quantizer's losses,   each a mean over elements.

    `fit` takes batches of images, float32 in [−1, 1], without targets.

    Args:
        image_shape: (H, W, C).
        quantizer: A `Quantizer`.
        downsampling: Image side divided by grid side, a power of two.
        network: "conv", the networks of `networks.py`, or "resnet", those of `resnet.py`.
        width: Channels of the networks, as defined there.
        residual_layers: Number of residual blocks, as defined there.
        residual_width: Channels inside a residual block of "conv".
        data_variance: Variance of the training pixels, scaled to [−1, 1].

    Attributes:
        layout: The `CodeLayout` of an image's codes.
    """

    def __init__(
        self,
        *,
        image_shape,
        quantizer,
        downsampling,
        network="conv",
        width,
        residual_layers,
        residual_width,
        data_variance=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.architecture = {
            "image_shape": tuple(image_shape),
            "downsampling": downsampling,
            "network": network,
            "width": width,
            "residual_layers": residual_layers,
            "residual_width": residual_width,
        }
        self.quantizer = quantizer
        self.data_variance = data_variance
        self.layout = self._layout()
        self._build_networks()
        names = ["loss", "reconstruction", *quantizer.loss_names, "quantization_error"]
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.codebook_use = CodebookUsage(self.layout)
        self.built = True

    def _layout(self):
        height, width, _ = self.architecture["image_shape"]
        factor = self.architecture["downsampling"]
        grid = (height // factor, width // factor)
        return CodeLayout(self.quantizer.num_codes, (grid,), self.quantizer.levels)

    def _build_networks(self):
        settings = {**self.architecture, "dtype": self.dtype_policy}
        builders = networks
        if settings.pop("network") == "resnet":
            builders = resnet
            del settings["residual_width"]
        self.encoder = builders.build_encoder(latent_channels=self.quantizer.dim, **settings)
        self.decoder = builders.build_decoder(latent_channels=self.quantizer.dim, **settings)
        self._build_quantizer(self.quantizer, self.layout.grids[0])

    def _build_quantizer(self, quantizer, grid):
        if not quantizer.built:  # one loaded from a file is already built
            quantizer.build((None, *grid, quantizer.dim))

    def call(self, images, training=False):
        """Encodes, quantizes and decodes images [B, H, W, C] in [−1, 1].

        Returns:
            A dictionary with `reconstruction`, float32 [B, H, W, C]; `codes`, int32
            [B, *layout.shape]; and `losses` and `statistics`, those of the quantizer by name.
        """
        result = self.quantize_images(images, training=training)
        return {
            "reconstruction": self.decoder(result.quantized, training=training),
            "codes": result.codes,
            "losses": result.losses,
            "statistics": result.statistics,
        }

    def quantize_images(self, images, training=False) -> Quantized:
        """Quantizes images [B, H, W, C] in [−1, 1]; `quantized` is the input of the decoder."""
        return self.quantizer(self.encoder(images, training=training), training=training)

    def latents(self, codes):
        """Returns the decoder's input [B, h, w, D] for codes [B, *layout.shape]."""
        return self.quantizer.decode_codes(codes)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the sum of all losses; records each of them, the statistics and the codes."""
        del y, sample_weight, training
        error = ops.square(ops.cast(x, "float32") - y_pred["reconstruction"])
        parts = {"reconstruction": ops.mean(error) / self.data_variance, **y_pred["losses"]}
        parts["loss"] = sum(parts.values())
        for name, value in {**parts, **y_pred["statistics"]}.items():
            self.trackers[name].update_state(value, sample_weight=ops.shape(x)[0])
        self.codebook_use.update_state(y_pred["codes"])
        return share_of_replica(parts["loss"])

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Returns the metrics recorded by `compute_loss`."""
        del x, y, y_pred, sample_weight
        return self.get_metrics_result()

    def initialize_codebook(self, images, method: str, seed: int) -> None:
        """Initializes the codebook before the first step; see `Quantizer.initialize`.

        Args:
            images: float32 [B, H, W, C] in [−1, 1].
            method: "random", "data" or "kmeans".
            seed: Random seed.
        """
        z = self.encoder(images, training=False)
        self.quantizer.initialize(self.quantizer.as_vectors(z), method, seed)

    def encode(self, images):
        """Returns the int32 codes [B, *layout.shape] of uint8 images [B, H, W, C]."""
        return self.quantize_images(scale_images(images)).codes

    def decode(self, codes):
        """Returns uint8 images [B, H, W, C] for codes [B, *layout.shape] in [0, num_codes)."""
        images = self.decoder(self.latents(codes), training=False)
        pixels = ops.clip(ops.round((images + 1.0) * 127.5), 0, 255)
        return ops.cast(pixels, "uint8")

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            **self.architecture,
            "quantizer": keras.saving.serialize_keras_object(self.quantizer),
            "data_variance": self.data_variance,
        }

    @classmethod
    def from_config(cls, config):
        """Returns a model from the output of `get_config`."""
        quantizer = keras.saving.deserialize_keras_object(config["quantizer"])
        # Earlier versions trained a discriminator here.
        known = {name: value for name, value in config.items() if "adversarial" not in name}
        return cls(**{**known, "quantizer": quantizer})


def scale_images(images):
    """Returns uint8 pixels scaled to float32 in [−1, 1]."""
    return ops.cast(images, "float32") / 127.5 - 1.0
