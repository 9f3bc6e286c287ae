import numpy as np
import pytest
import tensorflow as tf

from vqbeam.prior.filters import uniforms
from vqbeam.prior.serving import graph_uniforms

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def in_graph():
    """One graph for any seed, number of images and index, as an export has it."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64), tf.TensorSpec([None], tf.int64)])
    def numbers(seed, indices):
        return graph_uniforms(seed, indices, 15)

    return numbers


@pytest.mark.parametrize("seed", [0, 1, 1234567, -1, -(2**63), 2**63 - 1, 2**32, -(2**31)])
def test_bit_for_bit(in_graph, seed):
    indices = np.array([0, 1, 2, 77, 2**31, 2**32 - 1, 2**40 + 3, 2**63 - 1])
    found = in_graph(seed, indices).numpy()
    np.testing.assert_array_equal(found, uniforms(seed, indices, 15))
    assert found.dtype == np.float32


@pytest.mark.parametrize("length", [1, 3, 4, 5, 49])
def test_any_length(length):
    found = graph_uniforms(tf.constant(9, tf.int64), tf.range(3, dtype=tf.int64), length)
    np.testing.assert_array_equal(found, uniforms(9, np.arange(3), length))


def test_many(in_graph):
    indices = np.arange(3000) * 7
    np.testing.assert_array_equal(in_graph(5, indices), uniforms(5, indices, 15))


def test_no_images(in_graph):
    assert in_graph(0, np.zeros(0, "int64")).shape == (0, 15)
