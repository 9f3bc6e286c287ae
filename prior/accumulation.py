"""Gradient accumulation: training steps that compute a batch in parts."""

import keras
from keras import ops, tree


class AccumulatingModel(keras.Model):
    """A Keras model that computes each batch in parts, to save memory.

    Gradients are averaged over the parts, so a training step has one update, one step of the
    schedule and one of the weight EMA, as without accumulation. Only random layers such as dropout
    use different random numbers.

    Batches must contain inputs only, and `compute_loss` must return a mean over the batch.

    Attributes:
        parts: Number of parts of a batch. It must divide the number of examples per device.
    """

    parts = 1

    def train_step(self, *arguments):
        """Trains on one batch; called by Keras, with arguments that depend on the backend."""
        if self.parts == 1:
            return super().train_step(*arguments)
        if keras.backend.backend() == "jax":
            return self._jax_step(*arguments)
        return self._tensorflow_step(*arguments)

    def _tensorflow_step(self, data):
        import tensorflow as tf

        inputs, *_ = keras.utils.unpack_x_y_sample_weight(data)
        weights = self.trainable_weights

        def add(index, state):
            part = _part(inputs, index, self.parts)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x=part, y_pred=self(part, training=True))
                scaled = self.optimizer.scale_loss(loss)
            # Convert, since the gradients of embeddings are sparse.
            gradients = [tf.convert_to_tensor(g) for g in tape.gradient(scaled, weights)]
            return tree.map_structure(ops.add, state, [loss, *gradients])

        state = [ops.zeros(()), *map(ops.zeros_like, weights)]
        loss, *gradients = self._mean(ops.fori_loop(0, self.parts, add, state))
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self._loss_tracker.update_state(loss * replicas, sample_weight=_size(inputs))
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return self.compute_metrics(inputs, None, None)

    def _jax_step(self, state, data):
        import jax

        inputs, *_ = keras.utils.unpack_x_y_sample_weight(data)
        trainable, others, optimizer, metrics = state
        loss_gradients = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)

        def add(index, state):
            sums, others = state
            (_, (loss, _, others, _)), gradients = loss_gradients(
                trainable,
                others,
                metrics,
                _part(inputs, index, self.parts),
                None,
                None,
                training=True,
                optimizer_variables=optimizer,
            )
            return tree.map_structure(ops.add, sums, [loss, *gradients]), list(others)

        sums = [ops.zeros(()), *map(ops.zeros_like, trainable)]
        sums, others = ops.fori_loop(0, self.parts, add, (sums, list(others)))
        loss, *gradients = self._mean(sums)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        logs, metrics = self._update_metrics_variables(metrics, loss, inputs, None, None, None)
        return logs, (trainable, others, optimizer, metrics)

    def _mean(self, sums):
        return [total / self.parts for total in sums]


def _part(inputs, index, parts: int):
    """Returns every `parts`-th example from `index` on, so each device keeps an equal share."""

    def of(tensor):
        rows = ops.reshape(tensor, (-1, parts, *tensor.shape[1:]))
        return ops.take(rows, index, axis=1)

    return tree.map_structure(of, inputs)


def _size(inputs):
    return ops.shape(tree.flatten(inputs)[0])[0]
