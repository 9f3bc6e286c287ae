import dataclasses

import pytest

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.vqvae.storage.run_folder import RunFolder


@pytest.fixture
def run(tmp_path, tiny_config):
    """A run whose config has a guidance scale; its prior is a manifest alone."""

    def make(label_names):
        run = RunFolder(tmp_path)
        run.start(tiny_config(sample__guidance=2.0, sample__num=5))
        run.begin("train-prior")
        run.finish("train-prior", [], label_names=label_names)
        return Run(run.root)

    return make


def test_as_the_config_says_until_others_are_stored(run):
    run = run(["a", "b"])
    settings = run.config.sample
    assert run.default_settings() == settings and settings.guidance == 2.0
    better = dataclasses.replace(settings, temperature=0.8, guidance=3.0)
    run.store_default_settings(better)
    assert run.default_settings() == better
    changed = run.settings(temperature=None, min_p=0.1)
    assert changed == dataclasses.replace(better, min_p=0.1)


def test_no_guidance_without_classes(run):
    run = run([])
    assert run.default_settings() == SampleConfig(num=5, guidance=1.0)
    with pytest.raises(VqbeamError, match="guidance is 3, but the prior is trained with no labels"):
        run.settings(guidance=3.0)


def test_settings_of_one_schedule_alone(run):
    run = run(["a"])
    message = "guidance_end is 0.5, but guidance_schedule constant does not use it; set it to inter"
    with pytest.raises(VqbeamError, match=message):
        run.settings(guidance_end=0.5)
    message = "guidance_power is 2.0, but guidance_schedule interval does not use it; set it to cos"
    with pytest.raises(VqbeamError, match=message):
        run.settings(guidance_power=2.0, guidance_schedule="interval")
    found = run.settings(guidance_end=0.5, guidance_schedule="interval")
    assert found.guidance_end == 0.5
    run.store_default_settings(found)
    assert run.settings(guidance_start=0.2).guidance_start == 0.2


def test_no_guidance_where_no_image_was_learned_without_its_label(tmp_path, tiny_config):
    run = RunFolder(tmp_path)
    run.start(tiny_config(prior__label_dropout=0.0))
    run.begin("train-prior")
    run.finish("train-prior", [], label_names=["a"])
    run = Run(tmp_path)
    message = "guidance is 2, but the prior is trained with prior.label_dropout 0"
    with pytest.raises(VqbeamError, match=message):
        run.settings(guidance=2.0)
    assert run.settings(guidance=1.0).guidance == 1.0


@pytest.mark.parametrize("content", ['{"heat": 1.0}', "[1]", "{"])
def test_stored_settings_of_another_version(run, content):
    run = run(["a"])
    (run.path / "sample.json").write_text(content)
    with pytest.raises(VqbeamError, match="sample.json (does not fit this version|is not valid)"):
        run.default_settings()


def test_a_setting_that_does_not_exist(run):
    with pytest.raises(VqbeamError, match="no setting temprature; did you mean temperature?"):
        run(["a"]).settings(temprature=1)
    with pytest.raises(VqbeamError, match="no setting xyz; there are temperature, top_k"):
        run(["a"]).settings(xyz=None)


def test_a_change_out_of_range(run):
    with pytest.raises(VqbeamError, match="sample.top_p is 2"):
        run(["a"]).settings(top_p=2)
