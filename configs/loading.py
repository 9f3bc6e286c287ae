"""Loads presets by name or from a file, applies overrides, and converts configs to JSON."""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pathlib
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import vqbeam.configs.presets
from vqbeam.configs.fields import VqbeamError
from vqbeam.configs.schema import SECTIONS, Config


def preset_names() -> list[str]:
    """Returns the names of the built-in presets, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(vqbeam.configs.presets.__path__))


def load_preset(name: str) -> Config:
    """Returns the config of a built-in preset or of a user's preset file.

    Args:
        name: A name from `preset_names()`, or the path of a Python file that sets `CONFIG`.

    Raises:
        VqbeamError: There is no such preset, the file cannot be imported, or it does not set
            `CONFIG` to a `Config`.
    """
    module = _preset_module(name)
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, Config):
        raise VqbeamError(f"preset {name!r} does not set CONFIG to a vqbeam.configs.Config")
    return config


def preset_summary(name: str) -> str:
    """Returns the first line of a preset's docstring."""
    return (_preset_module(name).__doc__ or "").strip().partition("\n")[0]


def _preset_module(name: str) -> types.ModuleType:
    if name in preset_names():
        return importlib.import_module(f"vqbeam.configs.presets.{name}")
    path = pathlib.Path(name)
    if path.suffix != ".py":
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(preset_names())}"
        raise VqbeamError(f"no preset is named {name!r}; {hint} (or give the path of a .py file)")
    if not path.is_file():
        raise VqbeamError(f"there is no preset file {name!r}; check the path")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # for imports of files beside it
    try:
        spec.loader.exec_module(module)
    except VqbeamError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise VqbeamError(f"preset file {name!r} does not load: {reason}") from error
    finally:
        sys.path.pop(0)
    return module


def field_types() -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields `(dotted name, field, type)` for every config field except `name`.

    `seed` and `log` come first. The type of an optional field is that of its value when set.
    """
    of_all = {field.name: field for field in dataclasses.fields(Config)}
    yield "seed", of_all["seed"], int
    yield "log", of_all["log"], str
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            union = [t for t in typing.get_args(hints[field.name]) if t is not type(None)]
            yield f"{section}.{field.name}", field, union[0] if union else hints[field.name]


def typed_settings(config: Config) -> dict[str, str]:
    """Returns every setting as it is typed on the command line, by its dotted name."""
    found = {}
    for name, *_ in field_types():
        value = functools.reduce(getattr, name.split("."), config)
        found[name] = "none" if value is None else str(value)
    return found


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a copy of `config` with new values for some fields.

    Args:
        config: The original config; it is not modified.
        values: New values by dotted name, such as `{"vqvae.num_codes": 1024, "seed": 1}`.

    Raises:
        VqbeamError: A value has the wrong type or is out of range.
    """
    by_section: dict[str, dict[str, Any]] = {}
    top = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        if section:
            by_section.setdefault(section, {})[field] = value
        else:
            top[name] = value
    sections = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in by_section.items()
    }
    return dataclasses.replace(config, **top, **sections)


def smoke(config: Config) -> Config:
    """Returns `config` shrunk to run in seconds, with the same kinds of data and networks."""
    num_codes, fsq_levels = min(config.vqvae.num_codes, 32), config.vqvae.fsq_levels
    if config.vqvae.quantizer == "fsq" and num_codes < config.vqvae.num_codes:
        fsq_levels = "8,4"
    longest = max(64, config.vqvae.downsampling * config.vqvae.grids)
    return override(
        config,
        {
            "data.height": min(config.data.height, longest),
            "data.width": min(config.data.width, longest),
            "data.max_images": min(config.data.max_images or 64, 64),
            "data.images_per_shard": 48,
            "data.max_failed": max(config.data.max_failed, 0.2),  # 1% of 64 images allows none
            "vqvae.num_codes": num_codes,
            "vqvae.fsq_levels": fsq_levels,
            "vqvae.width": 8,
            "vqvae.residual_layers": 1,
            "vqvae.residual_width": 4,
            "vqvae.batch_size": 16,
            "vqvae.steps": 4,
            "vqvae.steps_per_epoch": 2,
            "vqvae.warmup_steps": min(config.vqvae.warmup_steps, 1),
            "vqvae.finetune_steps": min(config.vqvae.finetune_steps, 2),
            "encode.batch_size": 16,
            "prior.layers": 1,
            "prior.width": 16,
            "prior.heads": 2,
            "prior.kv_heads": min(config.prior.kv_heads, 2),
            "prior.batch_size": 16,
            "prior.grad_accumulation": min(config.prior.grad_accumulation, 2),
            "prior.steps": 4,
            "prior.steps_per_epoch": 2,
            "prior.warmup_steps": 1,
            "prior.pictures": min(config.prior.pictures, 4),
            "sample.num": 8,
            "sample.top_k": min(config.sample.top_k, num_codes),
            "sample.batch_size": 8,
        },
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dictionaries that can be written as JSON."""
    return dataclasses.asdict(config)


# Fields of earlier versions that had no effect on a finished run.
_REMOVED = {("vqvae", "adversarial_start")}


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the config for the output of `to_dict`.

    Fields that an older version did not have take their defaults, and removed fields are ignored.

    Raises:
        VqbeamError: A section is missing, or a field is unknown, has the wrong type or is out of
            range.
    """
    try:
        sections = {
            name: cls(**{k: v for k, v in values[name].items() if (name, k) not in _REMOVED})
            for name, cls in SECTIONS.items()
        }
        rest = {name: value for name, value in values.items() if name not in SECTIONS}
        return Config(**rest, **sections)
    except (KeyError, TypeError, AttributeError) as error:
        raise VqbeamError(
            f"the stored config is not compatible with this version of vqbeam ({error}); "
            "use the version that wrote it"
        ) from error


def differences(old: Config, new: Config) -> list[str]:
    """Returns one line per changed field, such as `vqvae.num_codes: 512 → 1024`."""
    before, after = _flat(old), _flat(new)
    return [
        f"{name}: {before[name]} → {after[name]}" for name in before if before[name] != after[name]
    ]


def _flat(config: Config) -> dict[str, Any]:
    flat = {}
    for name, value in to_dict(config).items():
        if name in SECTIONS:
            flat |= {f"{name}.{field}": v for field, v in value.items()}
        else:
            flat[name] = value
    return flat
