"""Training programs: several training steps in one compiled call, on data that stays on the device.

On a GPU, a small step takes less time than Python needs to start it. So one call runs many steps,
and the host sends only row numbers: the images or codes are already on the device, which gathers,
augments and scales each batch.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from vqbeam.configs import LESS_MEMORY, VqbeamError
from vqbeam.vqvae.fitting.data import TrainingData
from vqbeam.vqvae.fitting.devices import device_count, device_memory, on_cpu

# Maximum number of steps in a call on a GPU. On a CPU, steps take so long that one is enough.
_STEPS_PER_CALL = 100


def steps_per_call(steps_per_epoch: int) -> int:
    """Returns the number of steps in a call: on a GPU up to 100, a divisor of `steps_per_epoch`."""
    # With TensorFlow, devices cannot exchange tensors inside a loop.
    if on_cpu() or (keras.backend.backend() == "tensorflow" and device_count() > 1):
        return 1
    return max(n for n in range(1, _STEPS_PER_CALL + 1) if steps_per_epoch % n == 0)


@dataclasses.dataclass
class TrainingProgram:
    """State of a training with a program of several steps, for `fit`.

    Attributes:
        batches: Function from the index of the first step to the dataset for `fit`.
        left: Steps until the training ends.
        flops: Floating-point operations of a step; None before the first call, and if TensorFlow
            trains on several devices or runs eagerly.
    """

    batches: Callable[[int], tf.data.Dataset]
    left: float
    flops: float | None = None

    def take(self, steps: int) -> int:
        """Returns the number of steps of the next call: `steps`, or fewer in the last call."""
        count = min(steps, self.left)
        self.left -= count
        return count


@contextlib.contextmanager
def training_program(
    model: keras.Model, data: TrainingData, steps: int, left: float = math.inf
) -> Iterator[TrainingProgram]:
    """A context in which `fit` trains a compiled model with programs of several steps.

    Args:
        model: A compiled and built model.
        data: The data for training.
        steps: Steps in a program. They must divide the steps of every epoch except the last.
        left: Steps until the training ends. If they are no multiple of `steps`, the last call runs
            the remaining ones.
    """
    before, model.steps_per_execution = model.steps_per_execution, steps
    program = TrainingProgram(
        lambda first: data.batches(first, steps).map(_joined).prefetch(2), left
    )
    make = _jax_program if keras.backend.backend() == "jax" else _tensorflow_program
    model.train_function = make(model, data, steps, program)
    try:
        yield program
    finally:
        model.train_function = None  # it holds the data
        model.steps_per_execution = before


def _tensorflow_program(
    model: keras.Model, data: TrainingData, steps: int, facts: TrainingProgram
) -> Callable:
    """Returns the function that Keras's `fit` calls with an iterator of batches."""
    # Variables, so that each device has a copy; TensorFlow keeps those of int32 on the CPU, where
    # a program of a GPU cannot read them.
    held = {
        name: tf.Variable(array.astype("int64") if array.dtype == "int32" else array, False)
        for name, array in data.held.items()
    }

    def one(batch):
        return model.train_step(data.input(batch, held))

    if device_count() > 1:
        # Keras would take the first batch to build the model and the optimizer.
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model._maybe_symbolic_build = lambda **_: None
        return model._make_function(one)

    @tf.function(jit_compile=model.jit_compile, autograph=False)
    def program(batches, count):
        if steps == 1:
            return one(batches)

        def body(index):
            one(_part(batches, index, steps))
            return [index + 1]

        tf.while_loop(lambda index: index < count, body, [0])
        return model.get_metrics_result()

    def train(iterator):
        batches, count = next(iterator), facts.take(steps)
        if facts.flops is None and not tf.config.functions_run_eagerly():
            if steps == 1:
                traced = program.get_concrete_function(batches, count)
            else:
                function = tf.function(one, autograph=False)
                traced = function.get_concrete_function(_part(batches, 0, steps))
            facts.flops = _graph_flops(traced.graph)
        return program(batches, count)

    return train


def _graph_flops(graph: tf.Graph) -> float:
    profiler, logger = tf.compat.v1.profiler, tf.get_logger()
    options = profiler.ProfileOptionBuilder.float_operation() | {"output": "none"}
    level = logger.level
    logger.setLevel("ERROR")  # hides the notice that the profiler belongs to TensorFlow 1
    try:
        return float(profiler.profile(graph, options=options).total_float_ops)
    finally:
        logger.setLevel(level)


def _jax_program(
    model: keras.Model, data: TrainingData, steps: int, facts: TrainingProgram
) -> Callable:
    """Returns the function that Keras's `fit` calls with its state and an iterator of batches."""
    import jax

    held = {name: _on_each_device(array) for name, array in data.held.items()}
    compiled = {}

    def train(state, iterator):
        batches, count = _sent(next(iterator)), facts.take(steps)
        if count not in compiled:
            # With several devices, results stay where the state is.
            places = jax.tree.map(lambda value: value.sharding, state)
            function = jax_steps(model, data, steps, count)
            program = jax.jit(function, donate_argnums=0, out_shardings=(None, places))
            lowered = program.lower(state, held, batches)
            facts.flops = _lowered_flops(lowered)
            compiled[count] = lowered.compile()
            _check_memory(compiled[count].memory_analysis())
        return compiled[count](state, held, batches)

    return train


def _lowered_flops(lowered) -> float | None:
    """Returns the operations of a step: XLA counts the body of a loop once. None if unknown."""
    if counted := lowered.cost_analysis():
        return counted["flops"]
    # JAX counts nothing in a program for a GPU, but its CPU client counts what is in any program.
    with contextlib.suppress(Exception):  # not a public interface
        import jax
        from jax._src.lib import _jax

        client = jax.local_devices(backend="cpu")[0].client
        module = lowered.compiler_ir("hlo").as_hlo_module()
        return _jax.hlo_module_cost_analysis(client, module)["flops"]
    return None


def _check_memory(needed) -> None:
    """Raises a VqbeamError if a program needs more memory than its device has.

    Args:
        needed: XLA's memory analysis of the compiled program; None where there is none.
    """
    there = device_memory()
    if needed is None or there is None:
        return
    state = needed.argument_size_in_bytes
    rest = needed.temp_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
    if state + rest > there:
        raise VqbeamError(
            f"training needs {state / 2**30:.1f} GiB for weights, optimizer and data and "
            f"{rest / 2**30:.1f} GiB for a step, and the device has {there / 2**30:.1f} GiB; "
            f"{LESS_MEMORY}"
        )


def jax_steps(model: keras.Model, data: TrainingData, steps: int, count: int) -> Callable:
    """Returns a pure function that trains several steps.

    Its arguments are the model's state in the form of Keras's `fit`, the held arrays, and the
    batches of all steps in the form of `_joined`. It returns the logs and the new state.

    Args:
        model: A compiled and built model.
        data: The data for training.
        steps: Number of steps whose batches the function takes.
        count: Number of steps that it trains.
    """
    import jax

    def several(state, held, batches):
        def one(state, index):
            batch = data.input(_part(batches, index, steps), held)
            logs, new = model.train_step(state, batch)
            # Keras returns tuples in place of lists.
            return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(new)), logs

        if steps == 1:
            state, logs = one(state, 0)
            return logs, state
        state, logs = jax.lax.scan(one, state, jax.numpy.arange(count))
        # Metrics are means over the epoch so far, so those of the last step cover all steps.
        return jax.tree.map(lambda values: values[-1], logs), state

    return several


def _sent(batches):
    import jax

    # With several devices, Keras has already placed the batches.
    return jax.tree.map(lambda b: b if isinstance(b, jax.Array) else jax.device_put(b), batches)


def _on_each_device(array: np.ndarray):
    import jax

    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.device_put(array)
    mesh = distribution.device_mesh.backend_mesh
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def _joined(*batches):
    """Returns batches [steps, B, ...] as [B · steps, ...], from which `_part` takes single steps.

    In this order, each device gets its share of every batch.
    """

    def join(values):
        order = [1, 0, *range(2, len(values.shape))]
        return tf.reshape(tf.transpose(values, order), [-1, *values.shape[2:]])

    joined = tree.map_structure(join, batches)
    return joined if len(joined) > 1 else joined[0]  # `Dataset.map` unpacks tuples


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
    """Returns every `parts`-th example, starting at `index`: an equal share of each device's."""
    if parts == 1:
        return inputs

    def of(tensor):
        rows = ops.reshape(tensor, (-1, parts, *tensor.shape[1:]))
        return ops.take(rows, index, axis=1)

    return tree.map_structure(of, inputs)


def _size(inputs):
    return ops.shape(tree.flatten(inputs)[0])[0]
