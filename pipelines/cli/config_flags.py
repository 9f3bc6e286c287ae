"""Flags for the fields of a config, and the config that they make of a preset."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vqbeam import configs
from vqbeam.configs import SECTIONS, Config, VqbeamError
from vqbeam.configs.schema import fsq_codes
from vqbeam.pipelines.cli.parser import Parser
from vqbeam.pipelines.places import located


def add_config(parser: Parser, sections: Iterable[str]) -> dict[str, str]:
    """Adds `--seed` and a flag for each field of the sections; returns them by dotted name."""
    parser.add("--seed", int, "seed of all random numbers (unset: the preset's)")
    flags = {"seed": "--seed"}
    for section in sections:
        title = f"config: {section} (unset: the preset's value)"
        group = parser.add_argument_group(title, SECTIONS[section].__doc__)
        flags |= parser.add_fields(section, f"--{section}.", group)
    return flags


def overridden(config: Config, given: Mapping[str, Any], flags: Mapping[str, str]) -> Config:
    """Returns the config with what the given flags set."""
    values = {name: given[flag] for name, flag in flags.items() if flag in given}
    levels = values.get("vqvae.fsq_levels", config.vqvae.fsq_levels)
    if values.get("vqvae.quantizer", config.vqvae.quantizer) == "fsq":
        if "vqvae.fsq_levels" in values:
            values.setdefault("vqvae.num_codes", fsq_codes(levels) or config.vqvae.num_codes)
    elif levels != config.vqvae.fsq_levels:
        raise VqbeamError("--vqvae.fsq-levels is for fsq; add --vqvae.quantizer fsq")
    config = in_range(lambda: configs.override(config, values), flags)
    # A run may be gone on with from another working directory.
    return dataclasses.replace(config, data=located(config.data))


def in_range(build: Callable[[], Any], flags: Mapping[str, str]) -> Any:
    """Returns `build()`; what it says of a field, it says of the flag that sets the field."""
    try:
        return build()
    except VqbeamError as error:
        message = re.sub(r"[a-z]+\.[a-z_]+", lambda name: flags.get(name[0], name[0]), str(error))
        raise VqbeamError(message) from None
