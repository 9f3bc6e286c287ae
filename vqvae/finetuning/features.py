"""A small network, trained on the run's own images, whose features are used to compare images."""

import keras
import tensorflow as tf
from keras import layers, ops

from vqbeam.vqvae.fitting.data import TrainingData, training_data
from vqbeam.vqvae.fitting.devices import evenly_shared, share_of_replica
from vqbeam.vqvae.fitting.fit import Schedule, fit, set_seed
from vqbeam.vqvae.fitting.optimizers import AdamW, learning_rate, with_scaled_loss
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.storage.records import label_of, labels_of, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder

# Channels of the feature maps, each at half the resolution of the one before; the weights of the
# distances between maps, and the weight of the distance between logits. On CIFAR-10, with 600
# steps, twice the channels took 1.5 times as long for a Fréchet distance of 1.94 instead of 2.01.
_CHANNELS = (16, 32, 64)
_MAP_WEIGHTS = (0.5, 0.5, 3.0)
_LOGITS_WEIGHT = 0.1
FEATURES_BATCH = 64
_TURNS = 4


def feature_distance(features: keras.Model, images, reconstruction):
    """Returns the mean distance between the features of two batches of images, a scalar.

    The vectors at each position of a map are scaled to unit length, and their squared distances are
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

    It consists of pairs of 3×3 convolutions and average pooling, as in VGG
    (https://arxiv.org/abs/1409.1556). It differs from the classifier of `vqbeam evaluate`, because
    the network that trains the decoder must not judge it as well.

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
    """Returns the network of `build_features`, trained on the run's training images.

    It learns to predict their classes or, if there are none, by how many quarter turns an image is
    rotated (Gidaris et al. 2018, https://arxiv.org/abs/1803.07728).

    Args:
        run: A run with prepared images.
        steps: Number of training steps. Training resumes if it was interrupted.
    """
    config, batch_size = run.load_config(), evenly_shared(FEATURES_BATCH)
    data, outputs = _training(run, batch_size, config.seed + 1)
    set_seed(config.seed + 1)
    features = build_features(config.image_shape, outputs, config.vqvae.dtype)
    model = build_classification(features, steps, config.vqvae.dtype)
    schedule = Schedule(
        title="features",
        steps=steps,
        steps_per_epoch=steps,
        batch_size=batch_size,
        seed=config.seed,
        config=config,
        advice="vqvae.dtype float32",
    )
    folder = run.folder("train-vqvae") / "features"
    fit(model, schedule, data, None, folder, run.fingerprints("train-vqvae"))
    return features


def build_classification(features: keras.Model, steps: int, dtype: str) -> keras.Model:
    """Returns the compiled model that trains the network of `build_features` for `steps` steps."""
    model = _Classification(features.input, features.outputs[-1], name="classification")
    optimizer = AdamW(learning_rate(2e-3, steps=steps, warmup_steps=steps // 10))
    model.compile(with_scaled_loss(optimizer, dtype))
    return model


class _Classification(keras.Model):
    """A network that maps images to logits, trained on pairs of images and classes."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the mean cross-entropy."""
        losses = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        return share_of_replica(ops.mean(losses))


def _training(run: RunFolder, batch_size: int, seed: int) -> tuple[TrainingData, int]:
    """Returns batches of images with their targets, and the number of possible targets."""
    builder = open_dataset(run.folder("prepare"))
    labels = labels_of(builder)
    classes = len(labels.names) if labels.kind == "classes" else 0
    by_class = classes > 1

    def prepare(batch):
        images = scale_images(batch["image"])
        if by_class:  # the last target is "no class"
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
        batch_size=batch_size,
        seed=seed,
        numbers=numbers,
        prepare=prepare,
    )
    return data, classes + 1 if by_class else _TURNS


def turned(images, turns):
    """Returns images [B, H, W, C] rotated by `turns` quarter turns, int32 [B] in [0, 4).

    Images that are not square are mirrored for odd turns: 1 horizontally, 3 vertically.
    """
    _, height, width, _ = images.shape
    if height == width:
        ways = [ops.rot90(images, k, axes=(1, 2)) for k in range(_TURNS)]
    else:
        ways = [ops.flip(images, axis) if axis else images for axis in ((), (2,), (1, 2), (1,))]
    chosen = ops.one_hot(turns, _TURNS, dtype=images.dtype)[:, :, None, None, None]
    return ops.sum(ops.stack(ways, axis=1) * chosen, axis=1)
