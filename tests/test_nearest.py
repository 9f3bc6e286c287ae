import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.vqvae.fitting.devices import compile_function
from vqbeam.vqvae.quantizers import nearest
from vqbeam.vqvae.quantizers.nearest import nearest_codes

BACKEND = keras.backend.backend()
ON_JAX_TOO = pytest.mark.backend
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow alone")


def brute_force(vectors, codebook):
    """The codes by the definition of a distance, in float64, and how near the runner-up is."""
    differences = np.float64(vectors)[:, None] - np.float64(codebook)
    distances = np.square(differences).sum(-1)
    ordered = np.sort(distances, axis=1)
    return distances.argmin(1), ordered[:, 1] - ordered[:, 0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def whole(*shape, seed=0):
    """Small whole numbers: their scores are exact, and many are equal."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype("float32")


def run(vectors, codebook, **options):
    return np.asarray(nearest_codes(ops.array(vectors), ops.array(codebook), **options))


@pytest.mark.parametrize(
    ("size", "num_codes"),
    [
        (5, 1),
        (5, 2),
        (1, 63),
        (64, 64),
        pytest.param(5, 65, marks=ON_JAX_TOO),
        (1, 200),
        pytest.param(64, 200, marks=ON_JAX_TOO),
    ],
)
def test_matches_float64(size, num_codes):
    vectors, codebook = normal(size, 7), normal(num_codes, 7, seed=1)
    found = run(vectors, codebook)
    assert found.dtype == np.int32 and found.shape == (size,)
    if num_codes == 1:
        return np.testing.assert_array_equal(found, 0)
    wanted, margin = brute_force(vectors, codebook)
    clear = margin > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], wanted[clear])


def test_far_from_zero():
    vectors, codebook = normal(50, 8) + 30, normal(100, 8, seed=1) + 30
    wanted, margin = brute_force(vectors, codebook)
    clear = margin > 0.05
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(run(vectors, codebook)[clear], wanted[clear])


# One block of codes, a padded one among several, several whole ones, and one of all scores.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_codes", "block_size"),
    [
        (64, 64),
        pytest.param(150, 100, marks=ON_JAX_TOO),
        (300, 64),
        pytest.param(300, 2**20, marks=ON_JAX_TOO),
    ],
)
def test_of_equal_codes_the_first_in_any_blocks(num_codes, block_size):
    vectors, codebook = whole(37, 3), whole(num_codes, 3, seed=1)
    wanted, margin = brute_force(vectors, codebook)
    assert (margin == 0).sum() > 20
    np.testing.assert_array_equal(run(vectors, codebook, block_size=block_size), wanted)


@pytest.mark.backend
def test_penalties_are_added_to_the_squared_distances():
    vectors, codebook, penalties = normal(90, 3), normal(150, 3, seed=1), normal(150)
    distances = np.square(np.float64(vectors)[:, None] - codebook).sum(-1) + penalties
    ordered = np.sort(distances, axis=1)
    clear = ordered[:, 1] - ordered[:, 0] > 1e-4
    found = run(vectors, codebook, penalties=penalties, block_size=640)
    np.testing.assert_array_equal(found[clear], distances.argmin(1)[clear])
    assert (found != brute_force(vectors, codebook)[0]).mean() > 0.3


def test_zero_vectors_and_codes_take_the_first():
    np.testing.assert_array_equal(run(np.zeros((4, 3)), np.zeros((130, 3))), 0)
    np.testing.assert_array_equal(run(-whole(4, 3), np.zeros((130, 3)), block_size=64), 0)


def test_more_codes_than_a_block():
    codebook = normal(9000, 4)
    order = np.random.default_rng(1).permutation(9000)[:300]
    np.testing.assert_array_equal(run(codebook[order], codebook), order)


def test_no_vectors():
    found = run(np.zeros((0, 3)), normal(100, 3), block_size=64)
    assert found.shape == (0,) and found.dtype == np.int32


@pytest.mark.parametrize("value", [pytest.param(np.nan, marks=ON_JAX_TOO), np.inf, 1e30])
def test_codes_stay_in_range_whatever_the_input(value):
    vectors = np.full((5, 3), value, "float32")
    found = run(vectors, normal(70, 3), block_size=256)
    assert ((found >= 0) & (found < 70)).all()


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=ON_JAX_TOO)])
def test_compiled(jit):
    vectors, codebook = whole(45, 3), whole(150, 3, seed=1)
    function = compile_function(lambda z, c: nearest_codes(z, c, block_size=640), [], jit=jit)
    found = np.asarray(function(ops.array(vectors), ops.array(codebook)))
    np.testing.assert_array_equal(found, brute_force(vectors, codebook)[0])


@pytest.mark.slow
@only_tensorflow
@pytest.mark.parametrize(("num_codes", "jit"), [(50, False), (300, True)])
def test_unknown_number_of_vectors(compiled, num_codes, jit):
    import tensorflow as tf

    codebook = whole(num_codes, 3, seed=1)

    @tf.function(input_signature=[tf.TensorSpec([None, 3])], jit_compile=jit)
    def function(vectors):
        found = nearest_codes(vectors, tf.constant(codebook), block_size=640)
        assert found.shape.as_list() == [None]
        return found

    for size in (0, 1, 10, 11, 64):
        vectors = whole(size, 3)
        found = function(tf.constant(vectors)).numpy()
        np.testing.assert_array_equal(found, brute_force(vectors, codebook)[0])


def test_inside_a_symbolic_model():
    inputs = keras.Input((3,))
    codebook = ops.array(whole(100, 3, seed=1))
    outputs = keras.layers.Lambda(lambda z: nearest_codes(z, codebook, block_size=640))(inputs)
    vectors = whole(30, 3)
    found = keras.Model(inputs, outputs).predict(vectors, verbose=0)
    np.testing.assert_array_equal(found, brute_force(vectors, codebook)[0])


@only_tensorflow
def test_no_gradient():
    import tensorflow as tf

    vectors, codebook = tf.constant(normal(20, 3)), tf.constant(normal(100, 3))
    with tf.GradientTape() as tape:
        tape.watch([vectors, codebook])
        found = tf.cast(nearest_codes(vectors, codebook, block_size=640), tf.float32)
    assert tape.gradient(found, [vectors, codebook]) == [None, None]


def test_blocks_follow_the_device(monkeypatch):
    vectors, codebook, most = normal(9, 3), normal(512, 3), []
    row_blocks = nearest._row_blocks
    monkeypatch.setattr(
        nearest, "_row_blocks", lambda rows, limit: most.append(limit) or row_blocks(rows, limit)
    )
    for cpu in (True, False):
        monkeypatch.setattr(nearest, "on_cpu", lambda cpu=cpu: cpu)
        found = ops.convert_to_numpy(nearest_codes(vectors, codebook))
        np.testing.assert_array_equal(found, brute_force(vectors, codebook)[0])
    # On a GPU, the 64 vectors of each of 512 images are one block.
    assert most[0] * 512 == 2**20 and most[1] >= 512 * 64


@pytest.mark.backend
def test_float32_keeps_all_digits_on_gpus():
    run(normal(2, 3), normal(4, 3))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        assert not tf.config.experimental.tensor_float_32_execution_enabled()
    else:
        import jax

        program = jax.make_jaxpr(nearest_codes)(normal(2, 3), normal(4, 3))
        assert "Precision.HIGHEST" in str(program)


@pytest.mark.system
def test_memory_is_bounded():
    program = """
    import pathlib

    import numpy as np
    from keras import ops

    from vqbeam.vqvae.fitting.devices import compile_function
    from vqbeam.vqvae.quantizers.nearest import nearest_codes

    def peak():
        # What getrusage tells may be of the process that has started this one.
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    function = compile_function(nearest_codes, [], jit=False)
    numbers = np.random.default_rng(0)
    small = ops.array(numbers.normal(size=(8, 64)), "float32")
    np.asarray(function(small, small))
    vectors, codebook = (
        ops.array(numbers.normal(size=(size, 64)), "float32") for size in (16384, 65536)
    )
    before = peak()
    np.asarray(function(vectors, codebook))
    print(peak() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 1e9
