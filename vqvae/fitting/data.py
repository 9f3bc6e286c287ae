"""Training data: the batches of a split, in an order that depends only on the seed."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops, tree

from vqbeam.vqvae.fitting.devices import device_memory
from vqbeam.vqvae.storage.records import UNTUNED, training_batches

# Random numbers are drawn for this many steps at once. Each block of steps has its own seed.
_BLOCK = 100
# A dataset is held in memory up to these shares of the device's memory and of the host's. The share
# of the host is smaller, since TensorFlow makes a second copy there.
_SHARE_OF_DEVICE = 1 / 4
_SHARE_OF_HOST = 1 / 8
_CONTAINER_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Batches for training, whose images or codes can stay on the device.

    Attributes:
        batches: Function that takes the index of the first step and a number of steps, and returns
            an endless tf.data.Dataset. Each element has the batches of that many steps,
            [steps, B, ...].
        held: Arrays [N, ...] by name that are copied to the device once. If there are any, the
            batches are dictionaries with `rows`, integers [steps, B]: the rows of each array to
            take.
        prepare: Function from the batch of one step to the model's input. It is compiled with the
            training step, so it must use `keras.ops`.
    """

    batches: Callable[[int, int], tf.data.Dataset]
    held: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda batch: batch

    def input(self, batch: Any, held: dict[str, Any]) -> Any:
        """Returns the model's input for a batch and the held arrays on the device."""
        if held:
            rows = {
                name: ops.cast(ops.take(array, batch["rows"], axis=0), self.held[name].dtype)
                for name, array in held.items()
            }
            batch = rows | {name: values for name, values in batch.items() if name != "rows"}
        return self.prepare(batch)

    def inputs(self, first_step: int = 0) -> Iterator[Any]:
        """Yields the model's input at each step, endlessly."""
        for batch in self.batches(first_step, 1).as_numpy_iterator():
            yield self.input(tree.map_structure(lambda values: values[0], batch), self.held)


def training_data(
    examples: tf.data.Dataset,
    *,
    size: int,
    batch_size: int,
    seed: int,
    numbers: Callable[[tf.Tensor, int], dict[str, tf.Tensor]],
    prepare: Callable[[dict[str, Any]], Any],
) -> TrainingData:
    """Returns the training data of a split.

    If all examples fit in a quarter of the device's memory and an eighth of the host's, they are
    read once, and each pass over them has an order drawn from `seed` and the number of the pass.
    Otherwise, each pass reads them again, through a shuffle buffer.

    Args:
        examples: Dictionaries of tensors, in the order on disk.
        size: Number of examples.
        batch_size: Examples in a batch.
        seed: Seed of the order and of the random numbers.
        numbers: Function from a seed, int64 [2], and a number of examples N to the random numbers
            for these examples: tensors [N, ...] by name. It runs in tf.data.
        prepare: See `TrainingData`; it takes examples and random numbers in one dictionary.
    """
    bytes_each = sum(s.shape.num_elements() * s.dtype.size for s in examples.element_spec.values())
    held = _read(examples, size) if _fits_in_memory(size * bytes_each) else {}
    count = _BLOCK * batch_size
    draws = bool(numbers(tf.zeros([2], tf.int64), 1))

    def block(index):
        sent = numbers(tf.stack([np.int64(seed), index]), count)
        if held:
            sent |= {"rows": _rows(index * count + tf.range(count, dtype=tf.int64), size, seed)}
        return tree.map_structure(
            lambda values: tf.reshape(values, [_BLOCK, batch_size, *values.shape[1:]]), sent
        )

    def sent(first_step):
        first_block, before = divmod(first_step, _BLOCK)
        blocks = tf.data.Dataset.range(first_block, np.iinfo(np.int64).max).map(block).prefetch(2)
        return blocks.unbatch().skip(before)

    def read(first_step):
        return training_batches(
            examples, size=size, batch_size=batch_size, first_step=first_step, seed=seed
        )

    def batches(first_step, steps):
        if held:
            found = sent(first_step)
        elif draws:
            found = tf.data.Dataset.zip(read(first_step), sent(first_step))
            found = found.map(lambda one, other: {**one, **other})
        else:
            found = read(first_step)
        return found.batch(steps, drop_remainder=True).with_options(UNTUNED)

    return TrainingData(batches=batches, held=held, prepare=prepare)


def _rows(positions, size: int, seed: int):
    """Returns the row to train on at each position, int32; each pass has every row once."""
    passes = positions // size
    # The seed is hashed, since the cipher ignores the high bits of its key if there are few rows.
    parts = tf.constant(np.random.SeedSequence(seed).generate_state(2), tf.int64)
    seeds = tf.concat([tf.tile(parts[None], [len(passes), 1]), passes[:, None]], axis=1)
    last = tf.fill(tf.shape(passes), np.int64(size - 1))
    # Each pass is a permutation by a block cipher, which can be evaluated at any single position.
    rows = tf.raw_ops.RandomIndexShuffle(
        index=positions % size, seed=tf.cast(seeds, tf.uint32), max_index=last, rounds=16
    )
    return tf.cast(rows, tf.int32)


def _read(examples: tf.data.Dataset, size: int) -> dict[str, np.ndarray]:
    """Returns all examples as arrays [size, ...]."""
    arrays = {
        name: np.empty((size, *spec.shape), spec.dtype.as_numpy_dtype)
        for name, spec in examples.element_spec.items()
    }
    first = 0
    for batch in examples.batch(1024).prefetch(2).as_numpy_iterator():
        for name, values in batch.items():
            arrays[name][first : first + len(values)] = values
        first += len(values)
    return arrays


def _fits_in_memory(size: int) -> bool:
    device = device_memory()
    fits_device = device is None or size <= _SHARE_OF_DEVICE * device
    return fits_device and size <= _SHARE_OF_HOST * _host_memory()


def _host_memory() -> int:
    """Returns the bytes of memory of the host, or of the container if it has a limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        return min(memory, int(_CONTAINER_LIMIT.read_text()))
    return memory
