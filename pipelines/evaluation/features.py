"""What the Fréchet distance sees of images: features of the run's classifier, or of Inception."""

import contextlib
import socket
from collections.abc import Callable

import keras
import numpy as np

from vqbeam.configs import VqbeamError, first_line
from vqbeam.pipelines.evaluation.classifier import feature_model, load_classifier
from vqbeam.vqvae.fitting.compilation import compile_function
from vqbeam.vqvae.storage.run_folder import RunFolder

_INCEPTION_SIDE = 299
_INCEPTION_BATCH = 32
# A network that drops packets would be waited for minutes, once for each address of the host.
_SECONDS_TO_CONNECT = 10


# From uint8 images [B, H, W, C] to their features float32 [B, D], both NumPy.
Extract = Callable[[np.ndarray], np.ndarray]


def feature_extractor(run: RunFolder, name: str) -> Extract:
    """Returns a function from the images of a run to features of that name.

    Args:
        run: Its images are prepared.
        name: "classifier" is the one that vqbeam trains on the run's own images, and shows how
            well the classes can still be told. "inception" is Keras's InceptionV3, trained on
            ImageNet; published distances come from another copy of it, and differ somewhat.

    Raises:
        VqbeamError: The run has no classes for the classifier, or Inception's weights cannot be
            downloaded.
    """
    if name == "classifier":
        return compiled(feature_model(load_classifier(run)))
    return _in_small_batches(compiled(_inception(run)))


def compiled(model: keras.Model) -> Extract:
    """Returns what a model makes of uint8 images, float32 [B, D], as a function of NumPy arrays."""
    extract = compile_function(
        lambda images: model(images, training=False), model.variables, jit=False
    )
    return lambda images: keras.ops.convert_to_numpy(extract(images))


def _in_small_batches(extract: Extract) -> Extract:
    def in_small_batches(images: np.ndarray) -> np.ndarray:
        firsts = range(0, len(images), _INCEPTION_BATCH)
        return np.concatenate([extract(images[i : i + _INCEPTION_BATCH]) for i in firsts])

    return in_small_batches


def _inception(run: RunFolder) -> keras.Model:
    """Returns InceptionV3 from uint8 images of the run's shape to pooled features [B, 2048]."""
    images = keras.Input(run.load_config().image_shape, dtype="uint8")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(images)
    x = keras.layers.Resizing(_INCEPTION_SIDE, _INCEPTION_SIDE)(x)
    if images.shape[-1] == 1:
        x = keras.layers.Concatenate()([x, x, x])
    return keras.Model(images, _imagenet_weights()(x))


def _imagenet_weights() -> keras.Model:
    try:
        with _impatient():
            return keras.applications.InceptionV3(
                include_top=False, pooling="avg", weights="imagenet"
            )
    except Exception as error:  # Keras raises nothing narrower where a download fails
        raise VqbeamError(
            f"Inception's weights do not load ({first_line(error)}); use --features "
            "classifier, or put that file into ~/.keras/models"
        ) from error


@contextlib.contextmanager
def _impatient():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS_TO_CONNECT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
