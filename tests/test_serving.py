import keras
import numpy as np
import pytest

from vqbeam.configs import SampleConfig
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.layout import code_layout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
    ),
]

LABELS = np.array([0, 1, 2, -1, 1], "int32")


@pytest.fixture(scope="module")
def signatures_of(tiny_config):
    """Makes models, which draw more than one code, and their signatures."""
    from vqbeam.prior.serving import serving_signatures

    def make(settings, num_labels=3, conditioning="classes", **changes):
        config = tiny_config(**changes)
        vqvae = build_model(config, data_variance=1.0)
        keras.utils.set_random_seed(1)
        prior = CodePrior(
            code_layout(config), num_labels, layers=1, width=16, heads=2, conditioning=conditioning
        )
        for weight in prior.trainable_weights:
            weight.assign(weight + 0.5 * keras.random.normal(weight.shape))
        return vqvae, prior, serving_signatures(vqvae, prior, settings)

    return make


@pytest.fixture(scope="module")
def served(signatures_of):
    settings = SampleConfig(temperature=0.9, guidance=2.0, guidance_schedule="linear")
    return settings, *signatures_of(settings)


def operations(function):
    """The names of all operations of a function, in those too that it calls."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes}


def call(function, **inputs):
    import tensorflow as tf

    specs = {spec.name: spec for spec in tf.nest.flatten(function.structured_input_signature)}
    assert set(specs) == set(inputs)
    found = function(**{name: tf.constant(v, specs[name].dtype) for name, v in inputs.items()})
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_draws_what_the_sampler_draws(served):
    settings, vqvae, prior, functions = served
    found = call(functions["sample"], labels=LABELS, seed=-7)
    expected = Sampler(prior, 5)(LABELS, -7, settings)
    np.testing.assert_array_equal(found["codes"], expected)
    assert len(np.unique(found["codes"])) > 3
    decoded = keras.ops.convert_to_numpy(vqvae.decode(expected)).astype(int)
    assert np.abs(found["images"] - decoded).max() <= 1 and found["images"].dtype == np.uint8
    # Of any number of images.
    one = call(functions["sample"], labels=LABELS[:1], seed=-7)
    np.testing.assert_array_equal(one["codes"], expected[:1])


@pytest.mark.parametrize("top_k", [0, 4])
def test_draws_with_other_settings(served, top_k):
    settings, _, prior, functions = served
    chosen = {"temperature": 1.5, "top_k": top_k, "top_p": 0.9, "min_p": 0.05}
    found = call(
        functions["sample_with_settings"],
        labels=LABELS,
        seed=4,
        first_index=10,
        guidance=3.0,
        **chosen,
    )
    same = SampleConfig(guidance=3.0, guidance_schedule="linear", **chosen)
    expected = Sampler(prior, 5)(LABELS, 4, same, indices=np.arange(10, 15))
    np.testing.assert_array_equal(found["codes"], expected)


def test_encodes_and_decodes(served):
    _, vqvae, _, functions = served
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    codes = call(functions["encode"], images=images)["codes"]
    np.testing.assert_array_equal(codes, keras.ops.convert_to_numpy(vqvae.encode(images)))
    decoded = call(functions["decode"], codes=codes)["images"].astype(int)
    assert np.abs(decoded - keras.ops.convert_to_numpy(vqvae.decode(codes))).max() <= 1


# The last two kinds of labels, and quantizers that decode in another way.
NONE = dict(num_labels=0, vqvae__quantizer="predictive")
ATTRIBUTES = dict(
    conditioning="attributes",
    vqvae__quantizer="fsq",
    vqvae__fsq_levels="4,3",
    vqvae__grids=2,
)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [(NONE, [-1] * 4), (ATTRIBUTES, [[1, 0, 1], [0, 0, 0], [-1, -1, -1]])],
    ids=["no labels", "attributes"],
)
def test_labels_and_models_of_other_kinds(signatures_of, changes, labels):
    settings = SampleConfig(top_k=3, top_p=0.9, min_p=0.1, temperature=2.0)
    _, prior, functions = signatures_of(settings, **changes)
    given = "guidance" in str(functions["sample_with_settings"].structured_input_signature)
    assert given == (prior.num_labels > 0)
    assert_needs_no_xla(functions)
    labels = np.array(labels, "int32")
    found = call(functions["sample"], labels=labels, seed=3)
    expected = Sampler(prior, len(labels))(labels, 3, settings)
    np.testing.assert_array_equal(found["codes"], expected)


def assert_needs_no_xla(functions):
    for function in functions.values():
        found = operations(function)
        assert "Placeholder" in found and not [name for name in found if name.startswith("Xla")]


def test_no_operation_needs_xla(served):
    assert_needs_no_xla(served[-1])


def test_keras_is_left_as_it_was(served):
    from keras.src.backend.tensorflow import core

    assert core.slice_update.__module__ == core.__name__
