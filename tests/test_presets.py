import dataclasses
import importlib
import re

import pytest

from vqbeam import configs
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.measure_commands import run_presets as describe
from vqbeam.pipelines.paths import with_absolute_paths


def test_a_line_for_each():
    lines = describe().splitlines()
    assert [line.split()[0] for line in lines] == configs.preset_names()


@pytest.mark.parametrize("name", configs.preset_names())
def test_the_settings_of_one_are_words_that_make_it(name):
    summary, *lines = describe(name).splitlines()
    assert summary == configs.preset_summary(name)
    assert len(lines) == len(list(configs.field_types()))
    words = [word for line in lines for word in line.split()[:2]]
    given = parse(["run", "glyphs", "--run-dir", "d", *words])[1]["config"]
    config = configs.load_preset(name)
    config = dataclasses.replace(config, data=with_absolute_paths(config.data))
    changed = configs.differences(given, config)
    assert [change for change in changed if not change.startswith("name:")] == []


def test_a_file_of_ones_own(preset):
    assert "--vqvae.num-codes" in describe(preset)
    assert parse(["presets", preset])[1] == {"preset": preset}
    assert parse(["presets"])[1] == {"preset": None}


def test_none_of_that_name():
    with pytest.raises(VqbeamError, match="no preset is named 'glyph'; did you mean 'glyphs'?"):
        describe("glyph")


# What the docstring of a preset for a GPU says of a stage: its parameters, in millions, and its
# operations for an image in a step and for all of training.
SIZE = re.compile(
    r"[Ss]tage \d has ([\d.]+) million(?: parameters and takes|,) ([\d.]+) ([GT])FLOP"
    r"(?: per image and step,| and) ([\d.,]+) PFLOP"
)
FOR_A_GPU = [name for name in configs.preset_names() if "GPU" in configs.preset_summary(name)]


def sizes_of(model, batch):
    """The parameters of a model and the operations of a training step, of which none is run."""
    import tensorflow as tf

    from vqbeam.vqvae.fitting.program import _graph_flops

    model.compile("sgd")
    step = tf.function(model.train_step, autograph=False).get_concrete_function(batch)
    return model.count_params(), _graph_flops(step.graph)


@pytest.mark.system
@pytest.mark.parametrize("name", FOR_A_GPU)
def test_what_a_preset_says_of_its_size(name, compiled):
    import numpy as np
    import tensorflow as tf

    from vqbeam.prior.training import build_prior
    from vqbeam.vqvae.building import build_model
    from vqbeam.vqvae.layout import code_layout
    from vqbeam.vqvae.storage.labels import Labels

    config = configs.load_preset(name)
    images = tf.TensorSpec((1, *config.image_shape))
    found = {"vqvae": sizes_of(build_model(config, data_variance=1.0), images)}
    # All layers of a prior are equal: one and two tell the size of any number.
    inputs = {
        "codes": tf.TensorSpec((1, *code_layout(config).shape), "int32"),
        "labels": tf.TensorSpec((1,), "int32"),
    }
    labels = Labels(tuple(map(str, range(10))))
    changes = {"prior.grad_accumulation": 1}
    one, two = (
        np.array(
            sizes_of(
                build_prior(configs.override(config, changes | {"prior.layers": n}), labels), inputs
            )
        )
        for n in (1, 2)
    )
    found["prior"] = one + (config.prior.layers - 1) * (two - one)

    text = " ".join(importlib.import_module(f"vqbeam.configs.presets.{name}").__doc__.split())
    for section, said in zip(("vqvae", "prior"), SIZE.findall(text), strict=True):
        (parameters, flops), stage = found[section], getattr(config, section)
        in_all = flops * stage.batch_size * stage.steps
        print(f"{section}: {parameters:.4g} parameters, {flops:.4g} FLOP, {in_all:.4g} in all")
        millions, each, unit, petas = said
        assert float(millions) * 1e6 == pytest.approx(parameters, rel=0.05)
        assert float(each) * {"G": 1e9, "T": 1e12}[unit] == pytest.approx(flops, rel=0.05)
        assert float(petas.replace(",", "")) * 1e15 == pytest.approx(in_all, rel=0.05)
