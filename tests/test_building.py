import dataclasses
import json
import zipfile

import keras
import numpy as np
import pytest
from etils import epath
from quantizer_checks import array

from vqbeam.configs import WITHOUT_CODEBOOK, VQVAEConfig
from vqbeam.prior.training import build_optimizer as prior_optimizer
from vqbeam.prior.training import build_prior
from vqbeam.vqvae.building import build_model, build_quantizer
from vqbeam.vqvae.fitting.fit import save_model
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.hierarchy import HierarchicalVQVAE
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.fsq import FiniteScalarQuantizer
from vqbeam.vqvae.quantizers.lfq import LookupFreeQuantizer
from vqbeam.vqvae.quantizers.residual import ResidualQuantizer
from vqbeam.vqvae.quantizers.simvq import SimVQ
from vqbeam.vqvae.quantizers.vector import VectorQuantizer
from vqbeam.vqvae.storage.labels import Labels

COMMON = {"commitment": 0.7, "entropy": 0.1}
LOOKUP = {"estimator": "rotation"}
CODEBOOK = {"decay": 0.9, "restart_below": 0.2}
FROM_CONFIG = {"decay": "ema_decay", "update": "codebook_update"}
# The class, the arguments that it takes from settings, and settings of its size.
KINDS = {
    "vector": (VectorQuantizer, {"lookup": "cosine", **COMMON, **LOOKUP, **CODEBOOK}, {}),
    "residual": (
        ResidualQuantizer,
        {"update": "gradient", **COMMON, **LOOKUP, **CODEBOOK},
        {"depth": 3},
    ),
    "simvq": (SimVQ, {"lookup": "cosine", **COMMON, **LOOKUP}, {}),
    "fsq": (FiniteScalarQuantizer, {}, {"fsq_levels": "4,3"}),
    "lfq": (LookupFreeQuantizer, COMMON, {"num_codes": 16}),
}


def test_every_quantizer_is_tested_here():
    field = next(f for f in dataclasses.fields(VQVAEConfig) if f.name == "quantizer")
    # The predictive one is built from the layout, which test_predictive.py checks.
    assert {*KINDS, "predictive"} == set(field.metadata["choices"])


@pytest.mark.parametrize("name", sorted(KINDS))
def test_quantizers_take_all_from_the_config(tiny_config, name):
    kind, settings, size = KINDS[name]
    changes = {FROM_CONFIG.get(key, key): value for key, value in settings.items()}
    changes |= {"quantizer": name, **size}
    config = tiny_config(**{f"vqvae__{key}": value for key, value in changes.items()}).vqvae
    layer = build_quantizer(config)
    assert type(layer) is kind and not layer.built
    assert layer.num_codes == config.num_codes and layer.levels == config.depth
    found = layer.get_config()
    assert {key: found[key] for key in settings} == settings
    if name not in WITHOUT_CODEBOOK:
        assert layer.dim == config.code_dim
    if name == "fsq":
        assert layer.levels_per_channel == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("grids", [1, 2])
def test_models_of_every_kind_have_the_layout_of_their_config(tiny_config, name, grids):
    if name == "residual" and grids == 2:
        pytest.skip("the config refuses it")
    changes = {"quantizer": name, "grids": grids, **KINDS[name][2]}
    config = tiny_config(**{f"vqvae__{key}": value for key, value in changes.items()})
    model = build_model(config, data_variance=0.2)
    assert type(model) is (VQVAE if grids == 1 else HierarchicalVQVAE)
    assert model.built and model.layout == code_layout(config)
    assert model.data_variance == 0.2
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    codes = model.encode(images)
    assert tuple(codes.shape) == (3, *model.layout.shape)
    assert tuple(model.decode(codes).shape) == images.shape


def test_networks_take_all_from_the_config(tiny_config):
    config = tiny_config(
        vqvae__downsampling=2,
        vqvae__residual_layers=2,
        vqvae__dtype="mixed_bfloat16",
    )
    model = build_model(config, data_variance=0.2)
    found = model.get_config()
    for name in ("downsampling", "network", "width", "residual_layers", "residual_width"):
        assert found[name] == getattr(config.vqvae, name), name
    assert found["image_shape"] == config.image_shape
    assert model.compute_dtype == "bfloat16"


def test_weights_depend_on_the_seed_alone(tiny_config):
    one, same, other = (
        build_model(tiny_config(seed=seed), data_variance=1.0) for seed in (0, 0, 1)
    )
    for a, b in zip(one.weights, same.weights, strict=True):
        np.testing.assert_array_equal(array(a), array(b))
    for name in ("encoder", "decoder"):
        kernel = [array(getattr(model, name).trainable_variables[0]) for model in (one, other)]
        assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    codebooks = [array(model.quantizer.codebook) for model in (one, other)]
    assert np.abs(codebooks[0] - codebooks[1]).max() > 0.01
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.slow
def test_a_file_does_not_depend_on_models_that_were_built_before(tiny_config, tmp_path):
    config = tiny_config(vqvae__optimizer="muon", vqvae__learning_rate=1e-3)

    def stored(name):
        vqvae, prior = build_model(config, data_variance=1.0), build_prior(config, Labels(("a",)))
        vqvae.compile(build_optimizer(config.vqvae))
        prior.compile(prior_optimizer(config.prior))
        layout = code_layout(config)
        prior({"codes": np.zeros((1, *layout.shape), "int32"), "labels": np.zeros(1, "int32")})
        for kind, model in {"vqvae": vqvae, "prior": prior}.items():
            path = tmp_path / f"{name}-{kind}.keras"
            save_model(model, epath.Path(path))
            with zipfile.ZipFile(path) as file:
                yield json.loads(file.read("config.json"))

    assert list(stored("first")) == list(stored("second"))
