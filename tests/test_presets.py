import dataclasses

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
