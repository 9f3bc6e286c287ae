"""Trains the VQ-VAE of a run on its prepared images."""

import keras
import numpy as np
import tensorflow as tf

from configs import Config, VqbeamError
from vqvae.figures import reconstruction_figure, save_png
from vqvae.fitting import fit, load_model, save_model
from vqvae.metrics import psnr
from vqvae.model import VQVAE, build_model
from vqvae.records import damaged_records, open_dataset, read_split, training_batches
from vqvae.run_folder import RunFolder

STAGE = "train-vqvae"
MODEL_FILE = "model.keras"
_FIGURE_IMAGES = 16
# Enough to see where training goes; the whole split is measured once, at the end.
_VALIDATION_IMAGES = 2048


def train_vqvae(run_path: str) -> dict:
    """Trains the VQ-VAE of a run, from its last checkpoint where there is one.

    Writes `model.keras`, `reconstructions.png`, TensorBoard logs and the manifest. A finished
    stage is left as it is.

    Returns:
        The stage's manifest, with the measures over the whole validation split.

    Raises:
        VqbeamError: The images are not prepared or damaged, or training diverged.
    """
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return run.manifest(STAGE)
    images = run.require("prepare")
    config = run.load_config()
    run.begin(STAGE)
    with damaged_records(run.folder("prepare")):
        model, history = _fit(run, config, images)
        measures = evaluate(model, _validation(run, config))
        figure = _figure_images(run)
    outputs = [run.folder(STAGE) / MODEL_FILE, run.folder(STAGE) / "reconstructions.png"]
    save_model(model, outputs[0])
    save_png(reconstruction_figure(figure, reconstruct(model, figure)), outputs[1])
    return run.finish(
        STAGE,
        outputs,
        measures=measures,
        history=history,
        parameters=model.count_params(),
    )


def load_vqvae(run: RunFolder) -> VQVAE:
    """Returns the trained VQ-VAE of a run.

    Raises:
        VqbeamError: It is not trained, or the model is not that of the run's config.
    """
    run.require(STAGE)
    path = run.folder(STAGE) / MODEL_FILE
    model = load_model(path)
    check_fits(model, run.load_config(), path)
    return model


def check_fits(model, config: Config, path) -> None:
    """Raises a VqbeamError where a stage's model has another codebook or grid than the config."""
    found = (model.num_codes, tuple(model.grid))
    wanted = (config.vqvae.num_codes, config.grid)
    if found != wanted:
        raise VqbeamError(
            f"{path} has {found[0]} codes and grid {found[1]}, the run's config says {wanted[0]} "
            f"and {wanted[1]}; delete {path.parent} and train again"
        )


def reconstruct(model: VQVAE, images: np.ndarray) -> np.ndarray:
    """Encodes and decodes uint8 images [N, H, W, C]."""
    return keras.ops.convert_to_numpy(model.decode(model.encode(images)))


def evaluate(model: VQVAE, batches) -> dict[str, float]:
    """Measures a compiled model on batches of images in [−1, 1].

    Returns:
        The parts of the loss, perplexity and share of codes used over all batches, `mse` on
        pixels in [0, 255] and `psnr` in dB, both from the error over all pixels.
    """
    measures = model.evaluate(batches, return_dict=True, verbose=0)
    mse = measures["reconstruction"] * model.data_variance * 127.5**2
    return {
        **{name: float(value) for name, value in measures.items()},
        "mse": float(mse),
        "psnr": psnr(mse),
    }


def _fit(run: RunFolder, config: Config, images: dict) -> tuple[VQVAE, list[dict]]:
    settings = config.vqvae
    model = build_model(config, data_variance=images["statistics"]["variance"])
    schedule = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate, settings.steps, alpha=0.05
    )
    model.compile(keras.optimizers.Adam(schedule))
    dataset = read_split(open_dataset(run.folder("prepare")), "train").map(
        lambda example: example["image"], num_parallel_calls=tf.data.AUTOTUNE
    )

    def batches(first_step):
        return (
            training_batches(
                dataset,
                size=images["counts"]["train"],
                batch_size=settings.batch_size,
                first_step=first_step,
                seed=config.seed,
            )
            .map(scale_batch, num_parallel_calls=2)
            .prefetch(4)
        )

    history = fit(
        model,
        batches=batches,
        validation=_validation(run, config, _VALIDATION_IMAGES),
        folder=run.folder(STAGE),
        fingerprint=run.fingerprint(STAGE),
        steps=settings.steps,
        steps_per_epoch=settings.steps_per_epoch,
        batch_size=settings.batch_size,
        title="train vqvae",
        seed=config.seed,
        callbacks=[ReconstructionImages(run, _figure_images(run))],
    )
    return model, history


def _validation(run: RunFolder, config: Config, images: int | None = None):
    builder = open_dataset(run.folder("prepare"))
    size = builder.info.splits["validation"].num_examples
    last = min(size, images or size)
    examples = read_split(builder, "validation", last=last)
    return examples.map(lambda e: e["image"]).batch(config.encode.batch_size).map(scale_batch)


def _figure_images(run: RunFolder) -> np.ndarray:
    builder = open_dataset(run.folder("prepare"))
    last = min(_FIGURE_IMAGES, builder.info.splits["validation"].num_examples)
    examples = read_split(builder, "validation", last=last)
    return np.stack([example["image"] for example in examples.as_numpy_iterator()])


def scale_batch(images):
    """Scales a batch of uint8 images to [−1, 1] inside tf.data, whatever the Keras backend."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


class ReconstructionImages(keras.callbacks.Callback):
    """Shows TensorBoard the same held-out images, with their reconstructions, after each epoch."""

    def __init__(self, run: RunFolder, images: np.ndarray):
        super().__init__()
        self.images = images
        self.writer = tf.summary.create_file_writer(str(run.folder(STAGE) / "logs" / "images"))

    def on_epoch_end(self, epoch, logs=None):
        """Writes the picture."""
        figure = reconstruction_figure(self.images, reconstruct(self.model, self.images))
        with self.writer.as_default():
            tf.summary.image("reconstructions", np.asarray(figure)[None], step=epoch)
        self.writer.flush()
