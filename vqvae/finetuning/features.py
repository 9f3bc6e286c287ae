"""A small network that learns from the run's own images, and whose features compare images."""

import keras
import tensorflow as tf
from keras import layers, ops

from vqbeam.vqvae.fitting.data import TrainingData, training_data
from vqbeam.vqvae.fitting.devices import share_of_replica
from vqbeam.vqvae.fitting.fit import Schedule, fit, set_seed
from vqbeam.vqvae.fitting.optimizers import AdamW, learning_rate
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.storage.records import label_of, labels_of, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder

# Channels of the maps that are compared, each of half the resolution of the one before, and the
# weights of their distances and of that of the logits. On CIFAR-10, twice the channels took 1.5
# times as long and brought the Fréchet distance to 1.94 instead of 2.01 in 600 steps.
_CHANNELS = (16, 32, 64)
_MAP_WEIGHTS = (0.5, 0.5, 3.0)
_LOGITS_WEIGHT = 0.1
FEATURES_BATCH = 64
_TURNS = 4


def feature_distance(features: keras.Model, images, reconstruction):
    """Returns the mean distance of two batches of images in the features, a scalar.

    The vectors at each position of a map are scaled to unit length, and their squared distances
    averaged over positions: Zhang et al. 2018 (https://arxiv.org/abs/1801.03924), eq. 1 with one
    weight for each map. The mean squared difference of the logits is added, as in MaskBit (Weber et
    al. 2024, https://arxiv.org/abs/2409.16211). No gradient reaches `images`.

    Args:
        features: From `build_features`, not trainable.
        images: float32 [B, H, W, C] in [−1, 1].
        reconstruction: float32 [B, H, W, C].
    """
    *maps, logits = features(ops.concatenate([ops.stop_gradient(images), reconstruction]))
    one, other = ops.split(logits, 2)
    total = _LOGITS_WEIGHT * ops.mean(ops.square(one - other))
    for weight, found in zip(_MAP_WEIGHTS, maps, strict=True):
        length = ops.sqrt(ops.sum(ops.square(found), axis=-1, keepdims=True) + 1e-6)
        one, other = ops.split(found / length, 2)
        total += weight * ops.mean(ops.sum(ops.square(one - other), axis=-1))
    return total


def build_features(image_shape: tuple[int, int, int], outputs: int, dtype: str) -> keras.Model:
    """Returns an untrained network from images in [−1, 1] to its feature maps and its logits.

    Pairs of 3×3 convolutions and average pooling, as in VGG (https://arxiv.org/abs/1409.1556). It
    differs from the classifier of `vqbeam evaluate`, since what trains the decoder must not be its
    judge.

    Args:
        image_shape: (H, W, C).
        outputs: Number of logits.
        dtype: Keras dtype policy.

    Returns:
        A model with four outputs: maps [B, H, W, 16], [B, H/2, W/2, 32] and [B, H/4, W/4, 64], and
        logits [B, outputs], all float32.
    """
    images = x = keras.Input(image_shape)
    maps = []
    for channels in _CHANNELS:
        if maps:
            x = layers.AveragePooling2D(2, padding="same", dtype=dtype)(x)
        for _ in range(2):
            x = layers.Conv2D(channels, 3, padding="same", dtype=dtype)(x)
            x = layers.GroupNormalization(8, dtype=dtype)(x)
            x = layers.Activation("silu", dtype=dtype)(x)
        maps.append(layers.Activation("linear", dtype="float32")(x))
    pooled = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(images, [*maps, layers.Dense(outputs)(pooled)], name="features")


def train_features(run: RunFolder, steps: int) -> keras.Model:
    """Returns the network of `build_features`, which has learned from the run's training images.

    It learns their classes; without classes, by how many quarter turns an image is rotated (Gidaris
    et al. 2018, https://arxiv.org/abs/1803.07728).

    Args:
        run: A run with prepared images.
        steps: Training steps; training resumes if it was interrupted.
    """
    config = run.load_config()
    data, outputs = _training(run, config.seed + 1)
    set_seed(config.seed + 1)
    features = build_features(config.image_shape, outputs, config.vqvae.dtype)
    model = build_classification(features, steps)
    schedule = Schedule(
        title="features",
        steps=steps,
        steps_per_epoch=steps,
        batch_size=FEATURES_BATCH,
        seed=config.seed,
        config=config,
    )
    folder = run.folder("train-vqvae") / "features"
    fit(model, schedule, data, None, folder, run.fingerprints("train-vqvae"))
    return features


def build_classification(features: keras.Model, steps: int) -> keras.Model:
    """Returns the compiled model that trains the network of `build_features` in so many steps."""
    model = _Classification(features.input, features.outputs[-1], name="classification")
    model.compile(AdamW(learning_rate(2e-3, steps=steps, warmup_steps=steps // 10)))
    return model


class _Classification(keras.Model):
    """A network from images to logits that is trained on pairs of images and classes."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the mean cross-entropy."""
        losses = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        return share_of_replica(ops.mean(losses))


def _training(run: RunFolder, seed: int) -> tuple[TrainingData, int]:
    """Returns batches of images with the answers to learn, and the number of possible answers."""
    builder = open_dataset(run.folder("prepare"))
    labels = labels_of(builder)
    classes = len(labels.names) if labels.kind == "classes" else 0
    by_class = classes > 1

    def prepare(batch):
        images = scale_images(batch["image"])
        if by_class:  # the last answer is "no class"
            return images, ops.where(batch["label"] < 0, classes, batch["label"])
        return turned(images, batch["turns"]), batch["turns"]

    def numbers(seed, count):
        if by_class:
            return {}
        turns = tf.random.stateless_uniform([count], seed, 0, _TURNS, tf.int32)
        return {"turns": turns}

    def example(record):
        return {"image": record["image"]} | ({"label": label_of(record)} if by_class else {})

    data = training_data(
        read_split(builder, "train").map(example),
        size=builder.info.splits["train"].num_examples,
        batch_size=FEATURES_BATCH,
        seed=seed,
        numbers=numbers,
        prepare=prepare,
    )
    return data, classes + 1 if by_class else _TURNS


def turned(images, turns):
    """Returns images [B, H, W, C] rotated by `turns` quarter turns, int32 [B] in [0, 4).

    Of images that are not square, odd turns mirror instead: 1 from left to right, 3 upside down.
    """
    _, height, width, _ = images.shape
    if height == width:
        ways = [ops.rot90(images, k, axes=(1, 2)) for k in range(_TURNS)]
    else:
        ways = [ops.flip(images, axis) if axis else images for axis in ((), (2,), (1, 2), (1,))]
    chosen = ops.one_hot(turns, _TURNS, dtype=images.dtype)[:, :, None, None, None]
    return ops.sum(ops.stack(ways, axis=1) * chosen, axis=1)
