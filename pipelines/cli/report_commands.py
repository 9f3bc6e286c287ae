"""The words of the other verbs on a run's folder, or on presets."""

import os
from collections.abc import Sequence
from typing import Any

from vqbeam import configs
from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.cli.config_flags import add_config, overridden
from vqbeam.pipelines.cli.parser import Parser, count, location, nonempty


def parse_reconstruct(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `reconstruct`."""
    parser.describe("DIR --output FILE.png [--num N]")
    parser.add("DIR", location, "the run's folder")
    parser.add("--output", location, "the .png file to write", metavar="FILE.png", required=True)
    parser.add("--num", count, "images to draw (default: 16)", metavar="N", default=16)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"], "num": given["--num"]}


def run_reconstruct(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.evaluation.reconstructions import reconstruct

    return reconstruct(**arguments)


def parse_inspect(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `describe`."""
    parser.describe("DIR")
    parser.add("DIR", location, "the run's folder")
    return {"run_dir": parser.parse_words(words)["DIR"]}


def run_inspect(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.inspect import describe

    return describe(**arguments)


def parse_presets(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `describe`."""
    parser.describe("[PRESET]")
    kinds = "a name, or a .py file that sets CONFIG: shows all its settings"
    parser.add("PRESET", nonempty, kinds, nargs="?")
    return {"preset": parser.parse_words(words).get("PRESET")}


def run_presets(preset: str | None = None) -> str:
    """Returns the name and the summary of each preset, a line each; or the settings of one.

    Args:
        preset: A name or the path of a .py file, as `configs.load_preset` takes it.

    Raises:
        VqbeamError: There is no such preset.
    """
    if preset is not None:
        return _settings(preset)
    names = configs.preset_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {configs.preset_summary(name)}" for name in names)


def _settings(preset: str) -> str:
    """Returns a line for each flag that the preset has set, with its value and what it is."""
    config = configs.load_preset(preset)
    rows = [
        (f"--{name.replace('_', '-')}", _written(_value(config, name)), field.metadata["help"])
        for name, field, _ in configs.field_types()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{flag:<{widths[0]}}  {value:<{widths[1]}}  {text}" for flag, value, text in rows]
    return "\n".join([configs.preset_summary(preset), *lines])


def _value(config: configs.Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _written(value: Any) -> str:
    """Returns a value as it is typed."""
    return "none" if value is None else str(value)


def parse_gradients(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `gradients`."""
    flags = _add_gradients(parser)
    given = parser.parse_words(words)
    both = given["--no-straight-through"]
    if "--steps" in given and not both:
        parser.error("--steps trains nothing alone; add --no-straight-through")
    place = given["PRESET-OR-DIR"]
    is_run = place not in configs.preset_names() and _is_folder(place)
    changed = [flag for flag in flags.values() if flag in given]
    if is_run and changed:
        parser.error(f"{changed[0]} is for presets, and {place} is a folder")
    return {
        "config": None if is_run else overridden(_preset_of(place), given, flags),
        "run_dir": place if is_run else None,
        "output": given["--output"],
        "straight_through": not both,
        "steps": given.get("--steps", 200),
    }


def run_gradients(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.gradients import gradients

    return gradients(**arguments)


def _add_gradients(parser: Parser) -> dict[str, str]:
    rest = "PRESET-OR-DIR [--no-straight-through] [options] [--SECTION.FIELD VALUE ...]"
    parser.describe(rest)
    kinds = "a preset, for a fresh model on images from its source; or the folder of a trained run"
    parser.add("PRESET-OR-DIR", location, kinds)
    file = "the .png file to write (default: gradients.png)"
    parser.add("--output", location, file, metavar="FILE.png", default="gradients.png")
    parser.add_argument(
        "--no-straight-through",
        dest="--no-straight-through",
        action="store_true",
        help="set the model without an estimator beside it, and train both",
    )
    parser.add("--steps", count, "training steps of each of them (default: 200)", metavar="N")
    return add_config(parser, ("data", "vqvae"))


def _is_folder(place: str) -> bool:
    return "://" in place or os.path.isdir(os.path.expanduser(place))


def _preset_of(place: str) -> Config:
    """Returns the preset of a name that may have been meant for a folder."""
    try:
        return configs.load_preset(place)
    except VqbeamError as error:
        said = str(error) if place.endswith(".py") else f"there is no folder {place!r}, and {error}"
        raise VqbeamError(said) from None
