"""Features of images for the Fréchet distance, from the run's classifier or from InceptionV3."""

import contextlib
import math
import socket
import sys
import tarfile
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from etils import epath

from vqbeam.configs import VqbeamError, first_line
from vqbeam.vqvae.fitting.devices import compile_function
from vqbeam.vqvae.fitting.fit import load_model, save_model, set_seed
from vqbeam.vqvae.fitting.optimizers import learning_rate
from vqbeam.vqvae.fitting.progress import FitProgress
from vqbeam.vqvae.storage.files import read_json, write_json
from vqbeam.vqvae.storage.labels import NO_CLASS, Labels
from vqbeam.vqvae.storage.records import damaged_records, open_dataset, read_split, training_batches
from vqbeam.vqvae.storage.run_folder import RunFolder

_INCEPTION = "https://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
_INCEPTION_BATCH = 32
# If the network drops packets, connecting would take minutes for each address of the host.
_SECONDS_TO_CONNECT = 10


# From uint8 images [B, H, W, C] to their features, float32 [B, D].
Extract = Callable[[np.ndarray], np.ndarray]


def feature_extractor(run: RunFolder, name: str) -> Extract:
    """Returns a function from the images of a run to their features.

    Args:
        run: A run with prepared images.
        name: The network. "classifier" is a classifier that vqbeam trains on the run's own images,
            so the features show how well classes can be recognized. "inception" is the InceptionV3
            of published distances.

    Raises:
        VqbeamError: The run has no classes for the classifier, or Inception's weights cannot be
            downloaded.
    """
    if name == "classifier":
        return compiled(feature_model(load_classifier(run)))
    return _inception()


def compiled(model: keras.Model) -> Extract:
    """Returns the compiled function of a model that maps uint8 images to float32 [B, D]."""
    extract = compile_function(
        lambda images: model(images, training=False), model.variables, jit=False
    )
    return lambda images: keras.ops.convert_to_numpy(extract(images))


def _inception() -> Extract:
    """Returns the pooled features, 2,048 numbers, of the InceptionV3 of published distances.

    It is TensorFlow's graph of 2015, with which Heusel et al. 2017 (https://arxiv.org/abs/1706.08500)
    compute the distance, and which scales images itself.
    """
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.uint8, (None, None, None, 3))
        [pooled] = tf.graph_util.import_graph_def(
            _inception_graph(), {"ExpandDims:0": tf.cast(images, tf.float32)}, ["pool_3:0"]
        )
    # Not a tf.function, which does not run operations as old as those of this graph.
    options = tf.compat.v1.ConfigProto(gpu_options={"allow_growth": True})
    session = tf.compat.v1.Session(graph=graph, config=options)

    def extract(batch: np.ndarray) -> np.ndarray:
        in_colour = np.broadcast_to(batch, (*batch.shape[:-1], 3))
        firsts = range(0, len(batch), _INCEPTION_BATCH)
        parts = (in_colour[first : first + _INCEPTION_BATCH] for first in firsts)
        return np.concatenate([session.run(pooled, {images: part})[:, 0, 0] for part in parts])

    return extract


def _inception_graph() -> tf.compat.v1.GraphDef:
    try:
        with _impatient():
            path = keras.utils.get_file(origin=_INCEPTION, cache_subdir="models")
        with tarfile.open(path) as archive:
            data = archive.extractfile("classify_image_graph_def.pb").read()
        return tf.compat.v1.GraphDef.FromString(data)
    except Exception as error:  # Keras raises nothing narrower if a download fails
        raise VqbeamError(
            f"Inception's weights do not load ({first_line(error)}); use --features classifier, or "
            "put that file into ~/.keras/models"
        ) from error


@contextlib.contextmanager
def _impatient():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_TO_CONNECT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


FEATURES = "features"
_BATCH_SIZE = 128
# Five passes over 50,000 images. Small datasets get more passes, and are overfitted.
_MOST_STEPS = 2000
_MOST_PASSES = 100


def load_classifier(run: RunFolder) -> keras.Model:
    """Returns the classifier of a run's images, which is trained on first use.

    It is stored as `evaluation/classifier.keras`. `evaluation/classifier.json`, with the accuracy
    on the validation split, is written last.

    Returns:
        A model from uint8 [B, H, W, C] to logits float32 [B, classes].

    Raises:
        VqbeamError: The images are not prepared or damaged, or the run has fewer than two classes.
    """
    prepared = run.require("prepare")
    if label_obstacle(prepared):
        raise VqbeamError(
            f"{run.root} has no classes, and the classifier learns from them; use "
            "--features inception"
        )
    path, facts = run.evaluation / "classifier.keras", run.evaluation / "classifier.json"
    seed = run.load_config().seed
    identity = {"images": run.result_hash("prepare"), "seed": seed}
    if path.exists() and identity.items() <= _read(facts).items():
        try:
            return load_model(path)
        except VqbeamError:
            print(f"{path} cannot be read: a classifier is trained anew", file=sys.stderr)
    facts.unlink(missing_ok=True)
    run.evaluation.mkdir(parents=True, exist_ok=True)
    with damaged_records(run.folder("prepare")):
        model = _train(run, prepared, seed)
        accuracy = _accuracy(run, model)
    save_model(model, path)
    write_json(facts, {**identity, "accuracy": accuracy})
    return model


def label_obstacle(prepared: dict) -> str | None:
    """Returns why no classifier can be trained on a run's images, or None if one can.

    Args:
        prepared: The manifest of the prepare stage.
    """
    labels = Labels.of(prepared)
    if labels.kind == "attributes":
        return "attributes are no classes for the classifier to learn"
    return "no classes for the classifier to learn" if len(labels.names) < 2 else None


def classifier_accuracy(run: RunFolder) -> float:
    """Returns the accuracy of the stored classifier on the validation split."""
    return _read(run.evaluation / "classifier.json")["accuracy"]


def feature_model(classifier: keras.Model) -> keras.Model:
    """Returns the part of a classifier from uint8 images to pooled features, float32 [B, 256]."""
    return keras.Model(classifier.input, classifier.get_layer(FEATURES).output)


def build_classifier(image_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Returns an untrained classifier from uint8 images to logits.

    It computes in float32 everywhere, so that its features are the same on every machine up to
    rounding. It downsamples early, so that a CPU trains it in minutes.
    """
    images = keras.Input(image_shape, dtype="uint8")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(images)
    for channels, stride in ((32, 2), (64, 1), (128, 2), (256, 2)):
        x = keras.layers.Conv2D(channels, 3, stride, padding="same", use_bias=False)(x)
        # On small datasets, averages with the default of 0.99 would not settle during training.
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D(name=FEATURES)(x)
    return keras.Model(images, keras.layers.Dense(classes)(x))


def _train(run: RunFolder, prepared: dict, seed: int) -> keras.Model:
    unlabelled = prepared["statistics"]["images_per_label"].get(str(NO_CLASS), 0)
    size = prepared["counts"]["train"] - unlabelled
    batch_size = min(_BATCH_SIZE, size)
    steps = min(_MOST_STEPS, _MOST_PASSES * math.ceil(size / batch_size))
    set_seed(seed)
    model = build_classifier(run.load_config().image_shape, len(prepared["label_names"]))
    schedule = learning_rate(3e-3, steps=steps, warmup_steps=steps // 10)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    batches = training_batches(
        _examples(run, "train"), size=size, batch_size=batch_size, first_step=0, seed=seed
    )
    print(
        f"first, a classifier of the run's images is trained, whose features the metrics compare: "
        f"{steps:,} steps; it is kept in {run.evaluation}",
        file=sys.stderr,
    )
    progress = FitProgress("classifier", steps=steps, batch_size=batch_size)
    model.fit(
        batches.prefetch(4),
        steps_per_epoch=steps,
        shuffle=False,  # the batches are already shuffled
        verbose=0,
        callbacks=[progress],
    )
    return model


def _accuracy(run: RunFolder, model: keras.Model) -> float:
    accuracy = keras.metrics.SparseCategoricalAccuracy()
    for images, labels in _examples(run, "validation").batch(_BATCH_SIZE).as_numpy_iterator():
        accuracy.update_state(labels, model.predict_on_batch(images))
    return float(accuracy.result())


def _examples(run: RunFolder, split: str):
    """Returns the labelled images of a split and their classes."""
    examples = read_split(open_dataset(run.folder("prepare")), split).map(
        lambda example: (example["image"], example["label"])
    )
    return examples.filter(lambda _, label: label != NO_CLASS)


def _read(facts: epath.Path) -> dict:
    return read_json(facts) if facts.exists() else {}
