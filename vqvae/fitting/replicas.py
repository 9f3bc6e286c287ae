"""Statistics over all replicas of a data-parallel model.

With TensorFlow each replica runs the layer on its share of the batch, and must be asked to add up.
With JAX one program sees the whole batch, and its sums are those of all devices already.
"""

import keras


def sum_over_replicas(*tensors):
    """Returns each tensor added up over the replicas."""
    context = _replica_context()
    if context is None:
        return tensors
    import tensorflow as tf

    return tuple(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def mean_over_replicas(tensor):
    """Returns the mean of a tensor over the replicas; its gradient reaches all of them."""
    context = _replica_context()
    if context is None:
        return tensor
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.MEAN, tensor)


def from_first_replica(tensor):
    """Returns the tensor of replica 0 on all of them."""
    context = _replica_context()
    if context is None:
        return tensor
    import tensorflow as tf

    is_first = tf.cast(context.replica_id_in_sync_group == 0, tensor.dtype)
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor * is_first)


def share_of_replica(tensor):
    """Returns what a replica must give for the sum over replicas to be their mean."""
    context = _replica_context()
    return tensor if context is None else tensor / context.num_replicas_in_sync


def _replica_context():
    """Returns TensorFlow's replica context where there are several replicas."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context and context.num_replicas_in_sync > 1 else None
