"""Pictures of how the training of the prior goes."""

import keras
import numpy as np
import tensorflow as tf
from etils import epath

from vqbeam.prior.sampler import Sampler
from vqbeam.vqvae.figures import label_figure
from vqbeam.vqvae.fitting.compilation import compiled_decoder
from vqbeam.vqvae.model import VQVAE


class Pictures(keras.callbacks.Callback):
    """Shows TensorBoard, after each epoch, images that the prior draws.

    They are always those of the same labels and random numbers, drawn as the prior is: without
    guidance or filters.

    Args:
        folder: Of the event files.
        vqvae: Decodes the codes.
        labels: int32 [N], the label of each image, −1 for none; or its attributes [N, A].
        names: The name of each image's label; None where there are no classes.
        seed: Of the random numbers.
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
        """Notes the epoch."""
        self.epoch = epoch

    def on_test_begin(self, logs=None):
        """Writes the images: where validation begins, the weights are those that would be kept."""
        self.sampler = self.sampler or Sampler(self.model, len(self.labels))
        codes = self.sampler(self.labels, self.seed)
        images = keras.ops.convert_to_numpy(self.decode(codes))
        figure = label_figure(images, self.names)
        with self.writer.as_default():
            tf.summary.image("samples", np.asarray(figure)[None], step=self.epoch)
        self.writer.flush()
