"""Trains the decoder alone, on the codes of a trained VQ-VAE, together with a discriminator."""

import keras
from keras import layers, ops

from vqbeam.configs import VQVAEConfig
from vqbeam.vqvae.finetuning.features import feature_distance, train_features
from vqbeam.vqvae.fitting.data import TrainingData
from vqbeam.vqvae.fitting.devices import share_of_replica
from vqbeam.vqvae.fitting.fit import Fitted, Schedule, fit, set_seed
from vqbeam.vqvae.fitting.optimizers import Adam, learning_rate, with_scaled_loss
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.run_folder import RunFolder

# After 1,220 steps on CIFAR-10, the Fréchet distance is 1.06; at twice this rate it is 1.15.
_LEARNING_RATE = 1.2e-3


def finetune_decoder(run: RunFolder, model: VQVAE, data: TrainingData) -> Fitted:
    """Trains only the decoder of a trained model, resuming if it was interrupted.

    Args:
        run: The run that the model belongs to.
        model: The model; only its decoder changes.
        data: The training images.
    """
    config, folder = run.load_config(), run.folder("train-vqvae") / "finetuning"
    settings = config.vqvae
    features = train_features(run, settings.feature_steps) if settings.perceptual else None
    model.optimizer = None  # finetuning has an optimizer of its own
    set_seed(config.seed)
    trainer = build_trainer(model, features, settings)
    schedule = Schedule(
        title="decoder",
        steps=settings.finetune_steps,
        steps_per_epoch=settings.steps_per_epoch,
        batch_size=settings.batch_size,
        seed=config.seed,
        config=config,
        advice="a lower vqvae.perceptual or vqvae.adversarial, or with vqvae.dtype float32",
    )
    try:
        return fit(trainer, schedule, data, None, folder, run.fingerprints("train-vqvae"))
    finally:
        model.trainable = True


def build_trainer(
    model: VQVAE, features: keras.Model | None, settings: VQVAEConfig
) -> "DecoderTraining":
    """Returns a compiled model whose training trains the decoder of a VQ-VAE."""
    trainer = DecoderTraining(
        model, features, perceptual=settings.perceptual, adversarial=settings.adversarial
    )
    steps = settings.finetune_steps
    optimizer = Adam(
        learning_rate(_LEARNING_RATE, steps=steps, warmup_steps=steps // 20),
        beta_1=0.5,
        use_ema=True,
        ema_momentum=0.999,
    )
    trainer.compile(with_scaled_loss(optimizer, settings.dtype))
    return trainer


class DecoderTraining(keras.Model):
    """Trains the decoder of a VQ-VAE for sharper images; encoder and codebook stay as they are.

    With the squared error alone, a decoder blurs whatever the codes do not determine. The loss is

        ‖x − x̂‖² / variance + perceptual · d(x, x̂) − adversarial · D(x̂)

    with the distance d of `feature_distance` and a patch discriminator D, which is trained together
    with the decoder (Esser et al. 2021, https://arxiv.org/abs/2012.09841, with fixed weights).

    Args:
        vqvae: A trained model.
        features: The network that computes d; None if `perceptual` is 0.
        perceptual: Weight of the distance; 0 for none.
        adversarial: Weight of the adversarial loss; 0 for no discriminator.
    """

    def __init__(self, vqvae: VQVAE, features: keras.Model | None, *, perceptual, adversarial):
        super().__init__(dtype="float32")  # images are compared in full precision
        self.vqvae, self.features = vqvae, features
        self.perceptual, self.adversarial = perceptual, adversarial
        vqvae.trainable = False
        vqvae.decoder.trainable = True
        names = ["loss", "reconstruction"]
        if perceptual:
            features.trainable = False
            names.append("perceptual")
        if adversarial:
            self.discriminator = PatchDiscriminator(dtype=vqvae.dtype_policy)
            self.discriminator.build((None, *vqvae.architecture["image_shape"]))
            names += ["discriminator", "adversarial"]
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    def call(self, images, training=False):
        """Returns the weighted losses by name for images [B, H, W, C] in [−1, 1]."""
        latents = ops.stop_gradient(self.vqvae.quantize_images(images).quantized)
        reconstruction = self.vqvae.decoder(latents, training=training)
        error = ops.mean(ops.square(ops.cast(images, "float32") - reconstruction))
        losses = {"reconstruction": error / self.vqvae.data_variance}
        if self.perceptual:
            distance = feature_distance(self.features, images, reconstruction)
            losses["perceptual"] = self.perceptual * distance
        if self.adversarial:
            found = self.discriminator.losses_of(images, reconstruction)
            losses["discriminator"] = found["discriminator"]
            losses["adversarial"] = self.adversarial * found["adversarial"]
        return losses

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the sum of all losses and records each of them."""
        del y, sample_weight, training
        parts = y_pred | {"loss": sum(y_pred.values())}
        for name, value in parts.items():
            self.trackers[name].update_state(value, sample_weight=ops.shape(x)[0])
        return share_of_replica(parts["loss"])

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Returns the metrics recorded by `compute_loss`."""
        del x, y, y_pred, sample_weight
        return self.get_metrics_result()


@keras.saving.register_keras_serializable("vqbeam")
class PatchDiscriminator(layers.Layer):
    """A convolutional network that classifies image patches as original or reconstructed.

    From Isola et al. 2017 (https://arxiv.org/abs/1611.07004), section 3.2: a stack of strided
    convolutions, so that each output depends on one patch of the image. Group normalization
    replaces batch normalization, since originals and reconstructions come in separate batches.

    Args:
        width: Channels of the first convolution, doubled in each further strided convolution.
        strides: Number of strided convolutions.
    """

    def __init__(self, width=32, strides=2, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.strides = strides
        conv = {"kernel_size": 4, "padding": "same", "dtype": self.dtype_policy}
        self.stack = []
        for i in range(strides):
            self.stack.append(layers.Conv2D(width * 2**i, strides=2, **conv))
            if i:
                self.stack.append(layers.GroupNormalization(8, dtype=self.dtype_policy))
            self.stack.append(layers.LeakyReLU(0.2, dtype=self.dtype_policy))
        self.stack.append(layers.Conv2D(1, **conv))

    def build(self, input_shape):
        """Creates the weights for images [B, H, W, C]."""
        shape = input_shape
        for layer in self.stack:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, images):
        """Returns float32 logits [B, h, w, 1] for images [B, H, W, C]; high means original."""
        x = images
        for layer in self.stack:
            x = layer(x)
        return ops.cast(x, "float32")

    def losses_of(self, images, reconstruction):
        """Returns the scalar losses "discriminator" and "adversarial" of Lim and Ye 2017.

        These are the hinge loss, whose gradient reaches only the discriminator, and −D(x̂), whose
        gradient reaches only the reconstruction (https://arxiv.org/abs/1705.02894). They can
        therefore be summed and minimized by one optimizer.

        Args:
            images: [B, H, W, C].
            reconstruction: [B, H, W, C].
        """

        def logits(weights, images):
            return self.stateless_call(weights, self.non_trainable_variables, images)[0]

        # Each weight is read once. TensorFlow's graph optimizer may drop the order of a second read
        # and the update of the weight, if only the reconstruction's gradient depends on that read.
        weights = [ops.copy(variable) for variable in self.trainable_variables]
        frozen = [ops.stop_gradient(weight) for weight in weights]
        originals = ops.mean(ops.relu(1.0 - logits(weights, images)))
        copies = ops.mean(ops.relu(1.0 + logits(weights, ops.stop_gradient(reconstruction))))
        adversarial = -ops.mean(logits(frozen, reconstruction))
        return {"discriminator": originals + copies, "adversarial": adversarial}

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "width": self.width, "strides": self.strides}
