"""Trains, loads and evaluates the VQ-VAE of a run."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from etils import epath

from vqbeam.configs import Config, VqbeamError, differences
from vqbeam.vqvae.augmentation import augment, random_changes
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.figures import reconstruction_figure, save_png
from vqbeam.vqvae.finetuning.decoder import finetune_decoder
from vqbeam.vqvae.fitting.data import TrainingData, training_data
from vqbeam.vqvae.fitting.devices import data_parallel, evenly_shared
from vqbeam.vqvae.fitting.fit import Fitted, Schedule, fit, load_model, save_model
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.metrics import psnr
from vqbeam.vqvae.model import VQVAE, scale_images
from vqbeam.vqvae.storage.records import damaged_records, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder

STAGE = "train-vqvae"
MODEL_FILE = "model.keras"
_FIGURE_IMAGES = 16
# Validation images per epoch, to monitor training; the complete split is evaluated at the end.
VALIDATION_IMAGES = 2048


def train_vqvae(run_path: str, callbacks: Sequence[keras.callbacks.Callback] = ()) -> dict:
    """Trains the VQ-VAE of a run, resuming from its last checkpoint if there is one.

    Writes `model.keras`, `reconstructions.png`, TensorBoard logs and the manifest. Does nothing if
    the stage is already done.

    Args:
        run_path: The run's folder.
        callbacks: Additional Keras callbacks for training.

    Returns:
        The stage's manifest, with the metrics on the complete validation split.

    Raises:
        VqbeamError: The images are not prepared or are damaged, or training diverged.
    """
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return run.manifest(STAGE)
    images = run.require("prepare")
    config = run.load_config()
    run.check_replaceable(STAGE)
    run.begin(STAGE)
    path = run.folder(STAGE) / MODEL_FILE
    with damaged_records(run.folder("prepare")):
        fitted, finetuned = _fit(run, config, images, callbacks)
        # Evaluate the model as stored.
        model = load_model(path)
        model.compile()
        measures = evaluate(model, _validation(run, config.encode.batch_size))
        figure = _figure_images(run)
    picture = reconstruction_figure(figure, reconstruct(model, figure))
    save_png(picture, run.folder(STAGE) / "reconstructions.png")
    return run.finish(
        STAGE,
        [path],
        measures=measures,
        history=fitted.history,
        speed=fitted.speed,
        parameters=model.count_params(),
        **parent_facts(run, STAGE),
        **({"finetune_history": finetuned.history} if finetuned else {}),
    )


def load_vqvae(run: RunFolder) -> VQVAE:
    """Returns the trained VQ-VAE of a run.

    Raises:
        VqbeamError: The model has not been trained, or does not match the run's config.
    """
    run.require(STAGE, among=MODELS)
    path = run.folder(STAGE) / MODEL_FILE
    model = load_model(path)
    check_fits(model, run.load_config(), path)
    return model


def load_parent(run: RunFolder, stage: str) -> keras.Model | None:
    """Returns the model whose weights a training starts from.

    Args:
        run: The run that is trained.
        stage: Its stage.

    Returns:
        The model of another run; None without `init_from`, or if there is already a checkpoint.

    Raises:
        VqbeamError: The other run has no such model, or its model has changed.
    """
    if run.parent(stage) is None or run.has_begun(stage):
        return None
    path, model = run.parent(stage)
    parent = RunFolder(path)
    parent.require(stage, among=MODELS)
    found = parent.result_hash(stage)
    if not found.startswith(model):
        raise VqbeamError(
            f"{parent.folder(stage)} no longer holds the model that it held when this run was set "
            f"up ({found[: len(model)]}, not {model}); start a new run from it"
        )
    return load_model(parent.folder(stage) / MODEL_FILE)


def parent_facts(run: RunFolder, stage: str) -> dict[str, Any]:
    """Returns the manifest entries for the model that a training started from."""
    parent = run.parent(stage)
    return {"init_from": parent[1]} if parent else {}


# The settings that the shapes of the weights depend on.
_SHAPING = {
    "train-vqvae": (
        *("data.channels", "vqvae.quantizer", "vqvae.num_codes", "vqvae.code_dim", "vqvae.depth"),
        *("vqvae.grids", "vqvae.fsq_levels", "vqvae.downsampling", "vqvae.network"),
        *("vqvae.width", "vqvae.residual_layers", "vqvae.residual_width"),
        *("vqvae.codebook_update", "vqvae.balance", "vqvae.restart_below"),
    ),
    "train-prior": (
        *("data.height", "data.width", "vqvae.num_codes", "vqvae.depth", "vqvae.grids"),
        *("vqvae.downsampling", "prior.layers", "prior.width", "prior.heads", "prior.kv_heads"),
        "prior.qk_norm",
    ),
}


def misfit(run: RunFolder, stage: str) -> str:
    """Returns the start of an error message that the parent's weights do not fit, and why."""
    path, _ = run.parent(stage)
    changed = differences(RunFolder(path).load_config(), run.load_config())
    named = [change for change in changed if change.partition(":")[0] in _SHAPING[stage]]
    return f"the {stage} model of {path} does not fit ({'; '.join(named) or 'see its config'})"


def copy_weights(
    parent: keras.Model,
    model: keras.Model,
    misfit: str,
    skip: Sequence[keras.Variable] = (),
) -> None:
    """Copies the weights of a model to another one with the same architecture.

    Args:
        parent: The model to copy from.
        model: The model to copy to.
        misfit: The start of the error message.
        skip: Weights of `model` to leave as they are.

    Raises:
        VqbeamError: A weight has another shape, or is missing.
    """
    left = {id(variable) for variable in skip}
    pairs = list(itertools.zip_longest(parent.weights, model.weights))
    shapes = [
        f"{_layer(there if here is None else here)} {_shape(there)} → {_shape(here)}"
        for there, here in pairs
        if id(here) not in left and _shape(there) != _shape(here)
    ]
    if shapes:
        more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        raise VqbeamError(
            f"{misfit}: {', '.join(shapes[:3])}{more}; give the settings of that run, or leave "
            "out --init-from"
        )
    for there, here in pairs:
        if id(here) not in left:
            here.assign(there.value)


def _layer(weight: keras.Variable) -> str:
    """Returns the path of a weight, without the numbers that make Keras's layer names unique."""
    return re.sub(r"_\d+(?=/)", "", weight.path)


def _shape(weight: keras.Variable | None) -> str:
    return "none" if weight is None else str(list(weight.shape))


def check_fits(model, config: Config, path) -> None:
    """Raises a VqbeamError if a model's code layout differs from that of the run's config."""
    layout = code_layout(config)
    if model.layout != layout:
        raise VqbeamError(
            f"{path} has codes of layout {model.layout.describe()}, the run's config says "
            f"{layout.describe()}; delete {path.parent} and train again"
        )


def reconstruct(model: VQVAE, images: np.ndarray) -> np.ndarray:
    """Returns the reconstructions of images; both uint8 [N, H, W, C]."""
    return keras.ops.convert_to_numpy(model.decode(model.encode(images)))


def evaluate(model: VQVAE, batches) -> dict[str, float]:
    """Returns the metrics of a compiled model on batches of images in [−1, 1].

    Returns:
        The loss and its terms; perplexity and fraction of codes used over all batches; and `mse` on
        pixels in [0, 255] and `psnr` in dB, both from the mean error over all pixels.
    """
    measures = model.evaluate(batches, return_dict=True, verbose=0)
    mse = _mse(measures["reconstruction"], model)
    return {
        **{name: float(value) for name, value in measures.items()},
        "mse": float(mse),
        "psnr": psnr(mse),
    }


def _mse(reconstruction: float, model: VQVAE) -> float:
    """Returns the mean squared error of pixels in [0, 255] for a model's reconstruction loss."""
    return reconstruction * model.data_variance * 127.5**2


def epoch_figures(logs: dict[str, float], model: VQVAE) -> list[str]:
    """Returns the texts about held-out images for the line of an epoch, other than the loss."""
    codes = model.layout.levels * model.layout.num_codes
    used = round(logs["val_codes_used"] * codes)
    return [
        f"PSNR {psnr(_mse(logs['val_reconstruction'], model)):.1f} dB",
        f"{used:,} of {codes:,} codes used",
    ]


def _fit(
    run: RunFolder, config: Config, images: dict, callbacks: Sequence
) -> tuple[Fitted, Fitted | None]:
    """Trains and saves the model; returns what `fit` and `finetune_decoder` return."""
    settings = config.vqvae
    with data_parallel(settings.batch_size, settings.dtype):
        model = build_model(config, data_variance=images["statistics"]["variance"])
        model.compile(build_optimizer(settings))
        data = training_images(run, settings.augment)
        if parent := load_parent(run, STAGE):
            copy_weights(parent, model, misfit(run, STAGE))
        elif settings.codebook_init != "random":  # "random" does not need the first batch
            first = next(data.inputs())
            model.initialize_codebook(first, settings.codebook_init, config.seed)
        schedule = Schedule(
            title="train vqvae",
            steps=settings.steps,
            steps_per_epoch=settings.steps_per_epoch,
            batch_size=settings.batch_size,
            seed=config.seed,
            config=config,
            advice="a lower vqvae.learning_rate, or with vqvae.dtype float32",
            figures=lambda logs: epoch_figures(logs, model),
        )
        fitted = fit(
            model,
            schedule,
            data=data,
            validation=_validation(run, settings.batch_size, VALIDATION_IMAGES),
            folder=run.folder(STAGE),
            fingerprints=run.fingerprints(STAGE),
            callbacks=[
                Pictures(run.folder(STAGE) / "logs" / "images", _figure_images(run)),
                *callbacks,
            ],
        )
        finetuned = finetune_decoder(run, model, data) if settings.finetune_steps else None
    save_model(model, run.folder(STAGE) / MODEL_FILE)
    return fitted, finetuned


def training_images(run: RunFolder, augmentation: str = "none") -> TrainingData:
    """Returns the training images of a run, whose batches are float32 [B, H, W, C] in [−1, 1].

    Args:
        run: A run with prepared images.
        augmentation: A value of the setting `vqvae.augment`.
    """
    builder = open_dataset(run.folder("prepare"))
    examples = read_split(builder, "train").map(lambda example: {"image": example["image"]})
    size = builder.info.splits["train"].num_examples
    return augmented_batches(examples, size, run.load_config(), augmentation)


def augmented_batches(
    examples: tf.data.Dataset, size: int, config: Config, augmentation: str
) -> TrainingData:
    """Returns batches of augmented images; see `training_images`.

    Args:
        examples: Dictionaries with `image`, uint8 [H, W, C].
        size: Number of examples.
        config: The run's config.
        augmentation: A value of the setting `vqvae.augment`.
    """
    *sides, _ = config.image_shape

    def prepare(batch):
        images = batch.pop("image")
        return scale_images(augment(images, **batch))

    return training_data(
        examples,
        size=size,
        batch_size=config.vqvae.batch_size,
        seed=config.seed,
        numbers=lambda seed, count: random_changes(seed, augmentation, count, sides),
        prepare=prepare,
    )


def _validation(run: RunFolder, batch_size: int, images: int | None = None):
    """Returns batches of the validation split, limited to about `images` images if given."""
    builder = open_dataset(run.folder("prepare"))
    size = builder.info.splits["validation"].num_examples
    if images is not None:
        size = evenly_shared(min(size, images))
    examples = read_split(builder, "validation", last=size)
    return examples.map(lambda e: e["image"]).batch(batch_size).map(scale_batch)


def _figure_images(run: RunFolder) -> np.ndarray:
    builder = open_dataset(run.folder("prepare"))
    last = min(_FIGURE_IMAGES, builder.info.splits["validation"].num_examples)
    examples = read_split(builder, "validation", last=last)
    return np.stack([example["image"] for example in examples.as_numpy_iterator()])


def scale_batch(images):
    """Returns uint8 images scaled to [−1, 1], for use in tf.data with any Keras backend."""
    return tf.cast(images, tf.float32) / 127.5 - 1.0


class Pictures(keras.callbacks.Callback):
    """Writes reconstructions and a histogram of code counts to TensorBoard after each epoch.

    The images are the same in each epoch; the counts are over the validation images.

    Args:
        folder: Folder for the event files.
        images: Held-out images, uint8 [N, H, W, C].
    """

    def __init__(self, folder: epath.Path, images: np.ndarray):
        super().__init__()
        self.images = images
        self.writer = tf.summary.create_file_writer(str(folder))
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Stores the epoch number."""
        self.epoch = epoch

    def on_test_begin(self, logs=None):
        """Writes reconstructions here, since validation uses the weights that would be saved."""
        figure = reconstruction_figure(self.images, reconstruct(self.model, self.images))
        with self.writer.as_default():
            tf.summary.image("reconstructions", np.asarray(figure)[None], step=self.epoch)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the code counts of the validation that just ended."""
        counts = keras.ops.convert_to_numpy(self.model.codebook_use.counts)
        with self.writer.as_default():
            for level, of_level in enumerate(counts):
                tf.summary.histogram(f"codebook_use/level_{level}", of_level, step=epoch)
        self.writer.flush()
