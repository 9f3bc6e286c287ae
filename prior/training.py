"""Trains, loads and evaluates the prior of a run."""

import math
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from etils import epath
from keras import ops

from vqbeam.configs import Config, PriorConfig, VqbeamError
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.figures import label_figure
from vqbeam.vqvae.fitting.data import TrainingData, training_data
from vqbeam.vqvae.fitting.devices import compiled_decoder, data_parallel, evenly_shared
from vqbeam.vqvae.fitting.fit import Fitted, Schedule, fit, load_model, save_model, set_seed
from vqbeam.vqvae.fitting.optimizers import AdamW, Muon, optimizer_options
from vqbeam.vqvae.layout import CodeLayout, code_layout
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import (
    damaged_records,
    label_of,
    open_dataset,
    read_split,
)
from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder
from vqbeam.vqvae.training import (
    MODEL_FILE,
    VALIDATION_IMAGES,
    check_fits,
    copy_weights,
    load_parent,
    load_vqvae,
    misfit,
    parent_facts,
)

STAGE = "train-prior"


def train_prior(run_path: str, callbacks: Sequence[keras.callbacks.Callback] = ()) -> dict:
    """Trains the prior of a run, resuming from its last checkpoint if there is one.

    Writes `model.keras`, TensorBoard logs and the manifest. Does nothing if the stage is already
    done.

    Args:
        run_path: The run's folder.
        callbacks: Additional Keras callbacks for training.

    Returns:
        The stage's manifest, with the metrics on the complete validation split.

    Raises:
        VqbeamError: The codes are missing or damaged, or training diverged.
    """
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return run.manifest(STAGE)
    codes = run.require("encode")
    config = run.load_config()
    run.check_replaceable(STAGE)
    run.begin(STAGE)
    path = run.folder(STAGE) / MODEL_FILE
    with damaged_records(run.folder("encode")):
        fitted = _fit(run, config, codes, callbacks)
        # Evaluate the model as stored.
        model = load_model(path)
        model.compile()
        measures = evaluate(model, _validation(run, config), config)
    return run.finish(
        STAGE,
        [path],
        measures=measures,
        history=fitted.history,
        speed=fitted.speed,
        label_names=codes["label_names"],
        label_kind=Labels.of(codes).kind,
        parameters=model.count_params(),
        **parent_facts(run, STAGE),
    )


def build_prior(config: Config, labels: Labels) -> CodePrior:
    """Returns an untrained prior for a run and its labels; sets the global random seeds."""
    set_seed(config.seed)
    model = CodePrior(
        code_layout(config),
        num_labels=len(labels.names),
        conditioning=labels.kind,
        layers=config.prior.layers,
        width=config.prior.width,
        heads=config.prior.heads,
        kv_heads=config.prior.kv_heads,
        dropout=config.prior.dropout,
        qk_norm=config.prior.qk_norm == "rms",
        zero_init=config.prior.branch_init == "zeros",
        dtype=config.prior.dtype,
        name="prior",
    )
    model.parts = config.prior.grad_accumulation
    for block in model.blocks:
        block.remat = config.prior.remat == "blocks"
    return model


def load_prior(run: RunFolder) -> CodePrior:
    """Returns the trained prior of a run, in float32 regardless of the training precision.

    With bfloat16, the samples of a seed would depend on the batch size, and sampling on a CPU would
    take twice as long. See `vqbeam.prior.sampler.in_precision`.

    Raises:
        VqbeamError: The prior has not been trained, or does not match the run's config.
    """
    run.require(STAGE, among=MODELS)
    path = run.folder(STAGE) / MODEL_FILE
    model = load_model(path)
    check_fits(model, run.load_config(), path)
    return model.with_dtype("float32")


def evaluate(model: CodePrior, batches, config: Config) -> dict[str, float]:
    """Returns the metrics of a compiled prior on batches of codes and labels.

    Returns:
        `nats_per_code`, the mean cross-entropy, and `bits_per_dim`, the same in bits per value of
        an image (H·W·C values), without the reconstruction error.
    """
    nats = float(model.evaluate(batches, return_dict=True, verbose=0)["loss"])
    return {"nats_per_code": nats, "bits_per_dim": bits_per_dim(nats, model.layout, config)}


def bits_per_dim(nats_per_code: float, layout: CodeLayout, config: Config) -> float:
    """Returns nats per code converted to bits per value of an image (H·W·C values)."""
    return nats_per_code * layout.length / math.log(2) / math.prod(config.image_shape)


def build_optimizer(settings: PriorConfig) -> AdamW | Muon:
    """Returns the optimizer of stage 2, including its schedule."""
    options = {"weight_decay": settings.weight_decay} | optimizer_options(settings)
    if settings.optimizer == "muon":
        # Half the learning rate for AdamW: embeddings, norms and the head.
        adam = {"adam_weight_decay": settings.weight_decay, "adam_beta_2": 0.95}
        optimizer = Muon(adam_lr_ratio=0.5, **adam, **options)
    else:
        optimizer = AdamW(beta_2=0.95, **options)
    optimizer.exclude_from_weight_decay(var_names=["scale", "embeddings"])
    return optimizer


def _fit(run: RunFolder, config: Config, codes: dict, callbacks: Sequence) -> Fitted:
    """Trains and saves the model."""
    settings = config.prior
    callbacks = [_BitsPerDimension(config), *callbacks]
    if settings.pictures and run.manifest("train-vqvae"):  # the run may have only codes
        callbacks.append(_pictures(run, config, Labels.of(codes)))
    with data_parallel(settings.part_size, settings.dtype):
        model = build_prior(config, Labels.of(codes))
        _start_from_parent(model, run, Labels.of(codes))
        model.compile(build_optimizer(settings))
        schedule = Schedule(
            title="train prior",
            steps=settings.steps,
            steps_per_epoch=settings.steps_per_epoch,
            batch_size=settings.batch_size,
            seed=config.seed,
            config=config,
            advice="a lower prior.learning_rate, or with prior.dtype float32",
            patience=settings.early_stopping,
            figures=lambda logs: [f"{logs['val_bits_per_dim']:.4f} bits per dimension"],
        )
        fitted = fit(
            model,
            schedule,
            data=_training(run, config, codes, model),
            validation=_validation(run, config, limit=VALIDATION_IMAGES),
            folder=run.folder(STAGE),
            fingerprints=run.fingerprints(STAGE),
            callbacks=callbacks,
        )
    save_model(model, run.folder(STAGE) / MODEL_FILE)
    return fitted


def _start_from_parent(model: CodePrior, run: RunFolder, labels: Labels) -> None:
    """Copies the weights of the parent, if there is one; labels are matched by name."""
    parent = load_parent(run, STAGE)
    if parent is None:
        return
    path, _ = run.parent(STAGE)
    theirs = Labels.of(RunFolder(path).manifest(STAGE))
    why = misfit(run, STAGE)
    if theirs.kind != labels.kind:
        raise VqbeamError(
            f"the prior of {path} has {theirs.kind}, and this run {labels.kind}; leave out "
            "--init-from for the prior"
        )
    if parent.heads != model.heads:  # no shape depends on the number of heads
        raise VqbeamError(f"{why}; give the settings of that run, or leave out --init-from")
    embeddings = model.label_embedding.embeddings
    copy_weights(parent, model, why, skip=[embeddings])
    there = ops.convert_to_numpy(parent.label_embedding.embeddings)
    if there.shape[1] == embeddings.shape[1]:
        here = np.array(ops.convert_to_numpy(embeddings))
        # After the labels come the row for no label and, with attributes, the one of all images.
        here[len(labels.names) :] = there[len(theirs.names) :]
        for number, name in enumerate(labels.names):
            if name in theirs.names:
                here[number] = there[theirs.names.index(name)]
        embeddings.assign(here)


class _BitsPerDimension(keras.callbacks.Callback):
    """Adds bits per dimension to the metrics of each epoch."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def on_epoch_end(self, epoch, logs=None):
        for name in ("", "val_"):
            nats = logs[f"{name}loss"]
            logs[f"{name}bits_per_dim"] = bits_per_dim(nats, self.model.layout, self.config)


def _pictures(run: RunFolder, config: Config, labels: Labels) -> "Pictures":
    count = config.prior.pictures
    if labels.kind == "attributes":  # use real label combinations
        size = open_dataset(run.folder("encode")).info.splits["validation"].num_examples
        examples = _examples(run, "validation", last=min(size, count)).as_numpy_iterator()
        numbers, names = np.stack([example["labels"] for example in examples]), None
    else:
        numbers = np.resize(np.arange(len(labels.names)) if labels.names else -1, count)
        names = [labels.names[number] for number in numbers] if labels.names else None
    folder = run.folder(STAGE) / "logs" / "images"
    return Pictures(folder, load_vqvae(run), numbers, names, config.seed)


def _training(run: RunFolder, config: Config, codes: dict, model: CodePrior) -> TrainingData:
    """Returns the training codes, with labels randomly replaced by the null label."""
    settings = config.prior

    def prepare(batch):
        dropped = batch.pop("dropped")
        # The attributes of an image are dropped together.
        dropped = ops.reshape(dropped, (-1, *[1] * (len(batch["labels"].shape) - 1)))
        return batch | {"labels": ops.where(dropped, model.null_label, batch["labels"])}

    return training_data(
        _examples(run, "train"),
        size=codes["counts"]["train"],
        batch_size=settings.batch_size,
        seed=config.seed,
        numbers=lambda seed, count: {
            "dropped": tf.random.stateless_uniform([count], seed) < settings.label_dropout
        },
        prepare=prepare,
    )


def _validation(run: RunFolder, config: Config, limit: int | None = None):
    size = open_dataset(run.folder("encode")).info.splits["validation"].num_examples
    if limit is not None:
        size = evenly_shared(min(size, limit))
    return _examples(run, "validation", last=size).batch(config.prior.batch_size)


def _examples(run: RunFolder, split: str, last: int | None = None):
    builder = open_dataset(run.folder("encode"))

    def to_inputs(example):
        return {"codes": tf.cast(example["codes"], tf.int32), "labels": label_of(example)}

    return read_split(builder, split, last=last).map(to_inputs, num_parallel_calls=2)


class Pictures(keras.callbacks.Callback):
    """Writes samples from the prior to TensorBoard after each epoch.

    Labels and random numbers are the same in each epoch; no guidance or filters are used.

    Args:
        folder: Folder for the event files.
        vqvae: VQ-VAE that decodes the codes.
        labels: Label of each image, int32 [N], −1 for none; or its attributes [N, A].
        names: Name of each image's label; None for a grid without headings.
        seed: Random seed.
    """

    def __init__(
        self,
        folder: epath.Path,
        vqvae: VQVAE,
        labels: np.ndarray,
        names: list[str] | None,
        seed: int,
    ):
        super().__init__()
        self.labels, self.names, self.seed = labels, names, seed
        self.decode = compiled_decoder(vqvae)
        self.writer = tf.summary.create_file_writer(str(folder))
        self.sampler = None
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Stores the epoch number."""
        self.epoch = epoch

    def on_test_begin(self, logs=None):
        """Writes the images here, since validation uses the weights that would be saved."""
        self.sampler = self.sampler or Sampler(self.model, len(self.labels))
        codes = self.sampler(self.labels, self.seed)
        images = keras.ops.convert_to_numpy(self.decode(codes))
        figure = label_figure(images, self.names)
        with self.writer.as_default():
            tf.summary.image("samples", np.asarray(figure)[None], step=self.epoch)
        self.writer.flush()
