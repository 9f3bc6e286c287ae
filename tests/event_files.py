"""Reads the TensorBoard logs of training."""

import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events(folder):
    """Returns what a folder of event files holds: for each tag a value for each epoch."""
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto) for event in accumulator.Tensors(tag)}
        for tag in accumulator.Tags()["tensors"]
    }
