"""The VQ-VAE: encoder, quantizer and decoder as one Keras model."""

import keras
from keras import ops

from configs import Config
from vqvae.metrics import CodebookUse
from vqvae.networks import build_decoder, build_encoder
from vqvae.quantizer import VectorQuantizer


@keras.saving.register_keras_serializable("vqbeam")
class VQVAE(keras.Model):
    """Compresses images to grids of codes, and decodes such grids.

    The loss is that of van den Oord et al. 2017, equation 3, with the reconstruction error in
    units of the data's variance, so that one β fits datasets of any contrast:

        ‖x − x̂‖² / variance + ‖sg(z) − e‖² + β ‖z − sg(e)‖²,   each a mean over elements.

    `fit` takes batches of images, float32 in [−1, 1], and needs no targets.

    Args:
        image_shape: (H, W, C).
        num_codes: Codebook size K.
        code_dim: Length D of a codebook vector.
        downsampling: H over the grid's rows, a power of two.
        width: Channels of the networks.
        residual_layers: Residual blocks in each network.
        residual_width: Channels inside a block.
        commitment: The weight β.
        codebook_update: "ema" or "gradient".
        ema_decay: Decay of the moving averages.
        restart_below: See VectorQuantizer.
        data_variance: Variance of the training pixels on [−1, 1].
    """

    def __init__(
        self,
        *,
        image_shape,
        num_codes,
        code_dim,
        downsampling,
        width,
        residual_layers,
        residual_width,
        commitment=0.25,
        codebook_update="ema",
        ema_decay=0.99,
        restart_below=0.0,
        data_variance=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        network = {
            "code_dim": code_dim,
            "downsampling": downsampling,
            "width": width,
            "residual_layers": residual_layers,
            "residual_width": residual_width,
        }
        self._config = {
            "image_shape": tuple(image_shape),
            "num_codes": num_codes,
            **network,
            "commitment": commitment,
            "codebook_update": codebook_update,
            "ema_decay": ema_decay,
            "restart_below": restart_below,
            "data_variance": data_variance,
        }
        self.image_shape = tuple(image_shape)
        self.grid = (image_shape[0] // downsampling, image_shape[1] // downsampling)
        self.num_codes = num_codes
        self.commitment = commitment
        self.data_variance = data_variance
        self.encoder = build_encoder(self.image_shape, **network, dtype=self.dtype_policy)
        self.quantizer = VectorQuantizer(
            num_codes, code_dim, codebook_update, ema_decay, restart_below
        )
        self.decoder = build_decoder(self.image_shape, **network, dtype=self.dtype_policy)
        self.trackers = {
            name: keras.metrics.Mean(name=name)
            for name in ("loss", "reconstruction", "codebook", "commitment")
        }
        self.codebook_use = CodebookUse(num_codes)

    def build(self, input_shape):
        """Builds the quantizer; the networks are built with the model."""
        del input_shape
        self.quantizer.build(self.encoder.output_shape)

    def call(self, images, training=False):
        """Maps images [B, H, W, C] in [−1, 1] to a dict of reconstruction, codes and losses."""
        result = self.quantizer(self.encoder(images, training=training), training=training)
        return {
            "reconstruction": self.decoder(result.quantized, training=training),
            "codes": result.codes,
            "codebook_loss": result.codebook_loss,
            "commitment_loss": result.commitment_loss,
        }

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the three-part loss and records its parts and the codes in use."""
        del y, sample_weight, training
        reconstruction = (
            ops.mean(ops.square(ops.cast(x, "float32") - y_pred["reconstruction"]))
            / self.data_variance
        )
        parts = {
            "reconstruction": reconstruction,
            "codebook": y_pred["codebook_loss"],
            "commitment": self.commitment * y_pred["commitment_loss"],
        }
        parts["loss"] = sum(parts.values())
        for name, value in parts.items():
            self.trackers[name].update_state(value, sample_weight=ops.shape(x)[0])
        self.codebook_use.update_state(y_pred["codes"])
        return parts["loss"]

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Returns the metrics that `compute_loss` has recorded."""
        del x, y, y_pred, sample_weight
        return self.get_metrics_result()

    def encode(self, images):
        """Maps uint8 images [B, H, W, C] to codes [B, h, w] int32."""
        return self.quantizer.nearest(self.encoder(scale_images(images), training=False))

    def decode(self, codes):
        """Maps codes [B, h, w] in [0, num_codes) to uint8 images [B, H, W, C]."""
        images = self.decoder(self.quantizer.lookup(codes), training=False)
        pixels = ops.clip(ops.round((images + 1.0) * 127.5), 0, 255)
        return ops.cast(pixels, "uint8")

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), **self._config}


def scale_images(images):
    """Maps uint8 pixels to float32 in [−1, 1]."""
    return ops.cast(images, "float32") / 127.5 - 1.0


def build_model(config: Config, *, data_variance: float) -> VQVAE:
    """Returns an untrained, built model for a run.

    Args:
        config: The run.
        data_variance: Variance of the training pixels on [−1, 1].
    """
    # One up, since Dataset.shuffle takes no tensor as its seed where the global seed is zero.
    keras.utils.set_random_seed(config.seed + 1)
    settings = config.vqvae
    model = VQVAE(
        image_shape=config.image_shape,
        num_codes=settings.num_codes,
        code_dim=settings.code_dim,
        downsampling=settings.downsampling,
        width=settings.width,
        residual_layers=settings.residual_layers,
        residual_width=settings.residual_width,
        commitment=settings.commitment,
        codebook_update=settings.codebook_update,
        ema_decay=settings.ema_decay,
        restart_below=settings.restart_below,
        data_variance=data_variance,
        dtype=settings.dtype,
    )
    model.build((None, *config.image_shape))
    return model
