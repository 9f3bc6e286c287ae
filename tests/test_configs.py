import dataclasses
import json
import math
import sys
import types
import typing

import pytest

from vqbeam.configs import (
    SECTIONS,
    Config,
    DataConfig,
    PriorConfig,
    SampleConfig,
    VqbeamError,
    VQVAEConfig,
    differences,
    field_types,
    first_line,
    from_dict,
    load_preset,
    override,
    preset_names,
    preset_summary,
    smoke,
    to_dict,
)


@pytest.fixture
def config():
    return Config(name="mine", data=DataConfig(source="glyphs"))


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_shrinks(name):
    config = load_preset(name)
    assert config.name == name
    # A summary is one line of a listing, and ends as a sentence or a clause does.
    assert 20 < len(preset_summary(name)) <= 100 and "\n" not in preset_summary(name)
    small = smoke(config)
    assert small.data.max_images <= 64
    assert small.vqvae.steps * small.vqvae.batch_size <= 64
    assert small.prior.steps * small.prior.batch_size <= 64
    # More than one epoch and more than one shard, so that resuming and sharding are gone through.
    assert small.vqvae.steps > small.vqvae.steps_per_epoch
    assert small.prior.steps > small.prior.steps_per_epoch
    assert small.data.images_per_shard < small.data.max_images
    # The same kind of thing, smaller.
    kept = {
        "data": ["source", "channels", "fit"],
        "vqvae": [
            "quantizer",
            "codebook_update",
            "depth",
            "grids",
            "dtype",
            "downsampling",
            "code_dim",
            "commitment",
            "augment",
            "weight_ema",
            "perceptual",
            "adversarial",
        ],
        "prior": [
            "dtype",
            "dropout",
            "label_dropout",
            "schedule",
            "weight_ema",
            "clip_norm",
            "early_stopping",
        ],
        "sample": ["temperature", "top_k", "top_p", "guidance"],
    }
    for section, fields in kept.items():
        for field in fields:
            assert getattr(getattr(small, section), field) == getattr(
                getattr(config, section), field
            )
    if config.data.height <= 64:
        assert small.image_shape == config.image_shape and small.grid == config.grid
    assert smoke(small) == small


def test_presets_of_the_issue_are_there():
    assert {"glyphs", "fashion_mnist", "cifar10"} <= set(preset_names())
    assert preset_names() == sorted(preset_names())


def test_smoke_grows_nothing(config):
    small = override(config, {"data.max_images": 10, "vqvae.num_codes": 8})
    assert smoke(small).data.max_images == 10 and smoke(small).vqvae.num_codes == 8


def test_smoke_shrinks_large_images_to_what_the_grid_divides(config):
    large = override(config, {"data.height": 512, "data.width": 32, "vqvae.downsampling": 8})
    assert (smoke(large).data.height, smoke(large).data.width) == (64, 32)
    sides = {"data.height": 256, "data.width": 256}
    coarse = override(config, {**sides, "vqvae.downsampling": 128})
    assert smoke(coarse).image_shape[:2] == (128, 128)
    halved = override(config, {**sides, "vqvae.downsampling": 64, "vqvae.grids": 2})
    assert smoke(halved).image_shape[:2] == (128, 128)


def test_smoke_takes_what_the_whole_run_would(config):
    wide = override(config, {"sample.top_k": 100})
    assert smoke(wide).sample.top_k == 32
    # One damaged image of 64 is more than the usual 1%.
    assert smoke(config).data.max_failed == 0.2
    assert smoke(override(config, {"data.max_failed": 0.5})).data.max_failed == 0.5


def test_smoke_keeps_what_must_divide(config):
    large = override(config, {"prior.kv_heads": 8, "prior.grad_accumulation": 64})
    assert (smoke(large).prior.kv_heads, smoke(large).prior.grad_accumulation) == (2, 2)


def test_a_misspelt_preset_is_told_the_right_name():
    with pytest.raises(VqbeamError, match="no preset is named 'glyph'; did you mean 'glyphs'"):
        load_preset("glyph")
    with pytest.raises(VqbeamError, match="no preset is named 'zzz'; there are .*cifar10, "):
        load_preset("zzz")


PRESET = """\
\"\"\"My own data.

More of it.
\"\"\"

from vqbeam.configs import Config, DataConfig

CONFIG = Config(name="own", data=DataConfig(source="folder:/pictures"))
"""


def test_preset_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(PRESET)
    assert load_preset(str(path)).data.source == "folder:/pictures"
    assert preset_summary(str(path)) == "My own data."


def test_preset_file_may_import_one_beside_it(tmp_path):
    (tmp_path / "my_common_settings.py").write_text("CODES = 77\n")
    text = PRESET + "import dataclasses\nimport my_common_settings\n"
    text += "vqvae = dataclasses.replace(CONFIG.vqvae, num_codes=my_common_settings.CODES)\n"
    path = tmp_path / "own.py"
    path.write_text(text + "CONFIG = dataclasses.replace(CONFIG, vqvae=vqvae)\n")
    before = list(sys.path)
    assert load_preset(str(path)).vqvae.num_codes == 77
    assert sys.path == before


STAR = "from vqbeam.configs import *"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not set CONFIG to a vqbeam.configs.Config"),
        ("CONFIG = {'name': 'x'}", "does not set CONFIG to a vqbeam.configs.Config"),
        ("CONFIG = (", "does not load: SyntaxError"),
        ("import nowhere_to_be_found", "does not load: ModuleNotFoundError"),
        (
            f"{STAR}\nCONFIG = Config(name='x', data=DataConfig(souce='glyphs'))",
            "does not load: TypeError.*souce",
        ),
        (
            f"{STAR}\nCONFIG = Config(name='x', data=DataConfig(source='oops'))",
            "^data.source is 'oops'; use tfds:NAME",
        ),
    ],
)
def test_preset_file_errors(tmp_path, text, message):
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(VqbeamError, match=message):
        load_preset(str(path))


def test_absent_preset_file(tmp_path):
    with pytest.raises(VqbeamError, match="there is no preset file .*absent.py"):
        load_preset(str(tmp_path / "absent.py"))


NUMBERS = [
    (section, field.name, bound, field.metadata[bound])
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
    for bound in ("minimum", "maximum")
    if field.metadata[bound] is not None
]


@pytest.mark.parametrize(("section", "field", "bound", "limit"), NUMBERS)
def test_every_range_is_checked(config, section, field, bound, limit):
    step = 1 if isinstance(limit, int) else 0.001
    beyond = limit - step if bound == "minimum" else limit + step
    word = "least" if bound == "minimum" else "most"
    with pytest.raises(VqbeamError, match=f"^{section}.{field} is .*at {word} {limit}"):
        override(config, {f"{section}.{field}": beyond})


CHOICES = [
    (f"{section}.{field.name}", field.metadata["choices"])
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
    if field.metadata["choices"]
]


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_every_choice_is_checked(config, name, choices):
    for choice in choices:
        companions = {"vqvae.depth": 2} if choice == "residual" else {}
        override(config, {name: choice, **companions})
    with pytest.raises(VqbeamError, match=f"^{name} is 'other'; choose one of {choices[0]}, "):
        override(config, {name: "other"})


def test_defaults_are_within_their_ranges():
    for cls in (VQVAEConfig, PriorConfig, SampleConfig):
        cls()


RESIDUAL = {"vqvae.quantizer": "residual", "vqvae.depth": 2}
FSQ = {"vqvae.quantizer": "fsq"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.channels": 2}, "data.channels is 2; use 1"),
        ({"data.source": "tfds:"}, "data.source is 'tfds:'; use"),
        (
            {"data.source": "parquet:"},
            "data.source is 'parquet:'; use tfds:NAME, hf:NAME, folder:PATH, parq",
        ),
        ({"data.source": "glyphs:x"}, "data.source is 'glyphs:x'; use"),
        ({"vqvae.downsampling": 6}, "vqvae.downsampling is 6; it must be a power of two"),
        ({"data.height": 30}, r"data.height is 30, which vqvae.downsampling \(4\) does not div"),
        ({"vqvae.downsampling": 64}, "data.height is 32, which vqvae.downsampling"),
        ({"data.width": 34}, "data.width is 34"),
        ({"prior.heads": 3}, "prior.width is 256 and prior.heads is 3"),
        ({"prior.kv_heads": 3}, r"prior.heads is 8, which prior.kv_heads \(3\) does not divide"),
        ({"prior.grad_accumulation": 3}, "prior.batch_size is 64, which prior.grad_accum"),
        ({"prior.width": 48}, "prior.width is 48 and prior.heads is 8; .* multiple of 4"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"log": "tsv"}, "log is 'tsv'; give csv, wandb:PROJECT, csv,wandb:PROJECT or none"),
        ({"log": "csv:x"}, "log is 'csv:x'; give csv, wandb:PROJECT"),
        ({"log": "csv,wandb:"}, "log is 'csv,wandb:'; give csv, wandb:PROJECT"),
        ({"log": 3}, "log is 3; give a string or None"),
        ({"vqvae.perceptual": 1.0}, "vqvae.perceptual is 1, but vqvae.finetune_steps is 0"),
        ({"vqvae.adversarial": 0.1}, "vqvae.adversarial is 0.1, but vqvae.finetune_steps is 0"),
        ({"vqvae.finetune_steps": 9}, "vqvae.finetune_steps is 9, but vqvae.perceptual and"),
        ({"vqvae.quantizer": "residual"}, "quantizer is residual; set vqvae.depth to 2 or more"),
        ({"vqvae.depth": 2}, "vqvae.depth is 2; set vqvae.quantizer to residual"),
        ({**RESIDUAL, "vqvae.grids": 2}, "vqvae.quantizer is residual; use vqvae.grids 1"),
        (
            {"vqvae.network": "resnet", "vqvae.grids": 2},
            "vqvae.grids is 2; use vqvae.network conv",
        ),
        ({**RESIDUAL, "vqvae.lookup": "cosine"}, "is residual; use .* vqvae.lookup l2"),
        (
            {"vqvae.quantizer": "lfq", "vqvae.num_codes": 500},
            "vqvae.num_codes is 500; lfq takes a power of two",
        ),
        ({**FSQ, "vqvae.fsq_levels": "8,8"}, "8,8 make 64 codes, .* is 512; set it to 64"),
        ({**FSQ, "vqvae.fsq_levels": "512,1"}, "fsq_levels is '512,1'; give integers from 2 up"),
        ({**FSQ, "vqvae.fsq_levels": "8, 8,8"}, "fsq_levels is '8, 8,8'; give integers"),
        ({**FSQ, "vqvae.fsq_levels": "8,8,"}, "fsq_levels is '8,8,'; give integers"),
        ({**FSQ, "vqvae.fsq_levels": ""}, "fsq_levels is ''; give integers"),
        ({**FSQ, "vqvae.num_codes": 500}, "8,8,8 make 512 codes, .* is 500; set it to 512"),
        (
            {"vqvae.grids": 2, "data.height": 36},
            "data.height is 36, which makes a grid with an odd side; vqvae.grids 2 halves it",
        ),
        ({"vqvae.grids": 2, "data.width": 28}, "data.width is 28, which makes a grid with an odd"),
        (
            {"sample.top_k": 513},
            r"sample.top_k is 513, more than vqvae.num_codes \(512\); 0",
        ),
        (
            {"sample.top_p": 0.0},
            "sample.top_p is 0.0; it must be above 0; sample.top_k 1 is",
        ),
        (
            {"sample.guidance": 2.0, "prior.label_dropout": 0.0},
            "sample.guidance is 2, but the prior is trained with prior.label_dropout 0",
        ),
        ({"prior.label_dropout": 1.0}, "prior.label_dropout is 1.0; it must be at most 0.9"),
        ({"vqvae.learning_rate": math.nan}, "vqvae.learning_rate is nan; it must be finite"),
        ({"vqvae.commitment": math.inf}, "vqvae.commitment is inf; it must be finite"),
    ],
)
def test_checks_across_fields(config, changes, message):
    with pytest.raises(VqbeamError, match=message):
        override(config, changes)


@pytest.mark.parametrize(
    "changes",
    [
        RESIDUAL,
        {"vqvae.grids": 2, "data.height": 40},
        {"vqvae.quantizer": "lfq", "vqvae.num_codes": 2},
        {"vqvae.quantizer": "lfq", "vqvae.grids": 2},
        {**FSQ, "vqvae.fsq_levels": "5,4,3", "vqvae.num_codes": 60},
        # What a quantizer does not take is not looked at.
        {"vqvae.fsq_levels": "none"},
    ],
)
def test_what_fits_is_allowed(config, changes):
    changed = override(config, changes)
    assert from_dict(json.loads(json.dumps(to_dict(changed)))) == changed


def test_fsq_levels_as_numbers(config):
    assert config.vqvae.fsq_sizes == (8, 8, 8)


@pytest.mark.parametrize(
    ("changes", "num_codes", "fsq_levels"),
    [
        ({}, 32, "8,8,8"),
        (RESIDUAL, 32, "8,8,8"),
        ({"vqvae.quantizer": "simvq"}, 32, "8,8,8"),
        ({"vqvae.quantizer": "lfq"}, 32, "8,8,8"),
        ({"vqvae.quantizer": "lfq", "vqvae.num_codes": 16}, 16, "8,8,8"),
        (FSQ, 32, "8,4"),
        ({**FSQ, "vqvae.fsq_levels": "5,3", "vqvae.num_codes": 15}, 15, "5,3"),
        ({"vqvae.grids": 2}, 32, "8,8,8"),
    ],
)
def test_every_quantizer_shrinks(config, changes, num_codes, fsq_levels):
    long = {"vqvae.finetune_steps": 1000, "vqvae.perceptual": 1.0, "vqvae.warmup_steps": 500}
    small = smoke(override(config, changes | long))
    assert (small.vqvae.num_codes, small.vqvae.fsq_levels) == (num_codes, fsq_levels)
    for name, value in changes.items():
        if name not in ("vqvae.num_codes", "vqvae.fsq_levels"):
            assert getattr(small.vqvae, name.removeprefix("vqvae.")) == value
    assert small.vqvae.finetune_steps == 2 and smoke(config).vqvae.finetune_steps == 0
    assert small.vqvae.warmup_steps < small.vqvae.steps
    assert smoke(small) == small


def test_a_run_shorter_than_an_epoch_is_allowed(config):
    assert override(config, {"vqvae.steps": 7}).vqvae.steps == 7


def test_grid_and_image_shape(config):
    changed = override(config, {"data.height": 16, "data.width": 64, "data.channels": 1})
    assert changed.image_shape == (16, 64, 1) and changed.grid == (4, 16)


def test_override_leaves_the_rest(config):
    changed = override(config, {"vqvae.num_codes": 64, "vqvae.width": 8, "seed": 5})
    assert (changed.vqvae.num_codes, changed.vqvae.width, changed.seed) == (64, 8, 5)
    assert (changed.data, changed.prior) == (config.data, config.prior)
    assert config.vqvae.num_codes == VQVAEConfig().num_codes
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_differences_name_each_changed_field(config):
    assert differences(config, config) == []
    changed = override(config, {"vqvae.num_codes": 64, "data.max_images": 5, "seed": 5})
    assert sorted(differences(config, changed)) == [
        "data.max_images: None → 5",
        "seed: 0 → 5",
        "vqvae.num_codes: 512 → 64",
    ]


@pytest.mark.parametrize("name", preset_names())
def test_round_trip_through_json(name):
    config = override(load_preset(name), {"seed": 3, "vqvae.learning_rate": 1e-5})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("damage", ["section", "unknown section", "unknown field", "type"])
def test_a_stored_config_of_another_version(config, damage):
    values = to_dict(config)
    if damage == "section":
        del values["prior"]
    elif damage == "unknown section":
        values["gan"] = {}
    elif damage == "unknown field":
        values["vqvae"]["gone"] = 1
    else:
        values = []
    with pytest.raises(VqbeamError, match="is not compatible with this version of vqbeam"):
        from_dict(values)


def test_a_stored_config_with_fields_of_before(config):
    values = to_dict(config)
    for name in ("quantizer", "depth", "grids", "restart_below", "lookup", "augment"):
        del values["vqvae"][name]
    values["vqvae"]["dead_code_steps"] = 100
    with pytest.raises(
        VqbeamError, match="compatible with this version of vqbeam .*dead_code_steps.*; use the"
    ):
        from_dict(values)


def test_a_stored_config_out_of_range(config):
    values = to_dict(config)
    values["vqvae"]["num_codes"] = 0
    with pytest.raises(VqbeamError, match="vqvae.num_codes is 0"):
        from_dict(values)


def test_field_types_are_complete(config):
    found = {name: (field, kind) for name, field, kind in field_types()}
    expected = ["seed", "log"]
    for section, cls in SECTIONS.items():
        expected += [f"{section}.{field.name}" for field in dataclasses.fields(cls)]
    assert list(found) == expected
    for name, (field, kind) in found.items():
        assert field.metadata["help"], name
        assert kind in (int, float, str), name
    assert found["data.max_images"][1] is int and found["data.data_dir"][1] is str
    assert found["vqvae.learning_rate"][1] is float and found["seed"][1] is int


def test_sections_are_those_of_a_config():
    hints = typing.get_type_hints(Config)
    assert {k: v for k, v in hints.items() if dataclasses.is_dataclass(v)} == SECTIONS
    for section, cls in SECTIONS.items():
        assert cls.prefix == section


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vqvae.steps", 1e3, "vqvae.steps is 1000.0; give an integer"),
        ("vqvae.commitment", "much", "vqvae.commitment is 'much'; give a number"),
        ("data.max_images", "x", "data.max_images is 'x'; give an integer or None"),
        ("data.data_dir", 3, "data.data_dir is 3; give a string or None"),
        ("prior.layers", True, "prior.layers is True; give an integer"),
        ("seed", 0.5, "seed is 0.5; give an integer"),
    ],
)
def test_a_value_of_another_type(config, name, value, message):
    with pytest.raises(VqbeamError, match=message):
        override(config, {name: value})


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n one\ntwo"), "one"), (MemoryError(), "MemoryError()"), (ValueError(), "Val")],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error).startswith(line)


def test_a_number_may_be_whole(config):
    assert override(config, {"vqvae.commitment": 1}).vqvae.commitment == 1


def test_values_have_the_type_of_their_field():
    for name in preset_names():
        config = load_preset(name)
        for section, cls in SECTIONS.items():
            for field, hint in typing.get_type_hints(cls).items():
                if field == "prefix":
                    continue
                kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
                value = getattr(getattr(config, section), field)
                assert type(value) in kinds or (float in kinds and type(value) is int), field
