"""The words of the other verbs on a run's folder, or on presets."""

import os
from collections.abc import Sequence
from typing import Any

from vqbeam import configs
from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.cli.config_flags import add_config, overridden
from vqbeam.pipelines.cli.parser import Parser, count, location, nonempty
from vqbeam.pipelines.cli.verbs import verb_parser


def parse_reconstruct(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `reconstruct`."""
    parser = verb_parser(verb, "DIR --output FILE.png [--num N]")
    parser.add("DIR", location, "the run's folder")
    parser.add("--output", location, "the .png file to write", metavar="FILE.png", required=True)
    parser.add("--num", count, "images to draw (default: 16)", metavar="N", default=16)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"], "num": given["--num"]}


def parse_inspect(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `describe`."""
    parser = verb_parser(verb, "DIR")
    parser.add("DIR", location, "the run's folder")
    return {"run_dir": parser.parse_words(words)["DIR"]}


def parse_presets(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `describe`."""
    parser = verb_parser(verb, "[PRESET]")
    kinds = "a name, or a .py file that sets CONFIG: shows all its settings"
    parser.add("PRESET", nonempty, kinds, nargs="?")
    return {"preset": parser.parse_words(words).get("PRESET")}


def parse_gradients(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `gradients`."""
    parser, flags = _gradients_parser(verb)
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


def _gradients_parser(verb: str) -> tuple[Parser, dict[str, str]]:
    rest = "PRESET-OR-DIR [--no-straight-through] [options] [--SECTION.FIELD VALUE ...]"
    parser = verb_parser(verb, rest)
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
    return parser, add_config(parser, ("data", "vqvae"))


def _is_folder(place: str) -> bool:
    return "://" in place or os.path.isdir(os.path.expanduser(place))


def _preset_of(place: str) -> Config:
    """Returns the preset of a name that may have been meant for a folder."""
    try:
        return configs.load_preset(place)
    except VqbeamError as error:
        said = str(error) if place.endswith(".py") else f"there is no folder {place!r}, and {error}"
        raise VqbeamError(said) from None
