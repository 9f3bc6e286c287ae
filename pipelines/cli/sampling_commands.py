"""Parsers of the commands that sample images from a trained run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vqbeam.configs import SampleConfig
from vqbeam.pipelines.cli.parser import (
    BEAM_HELP,
    RUN,
    Parser,
    count,
    in_range,
    location,
    natural,
    nonempty,
    run_location,
)
from vqbeam.pipelines.paths import is_dataflow, with_runner

_ORDER = """\
Codes are sampled in raster order, each conditioned on those before it, so the kept part has no
influence on codes before it: with --keep bottom-half the upper half may not fit the lower one.
A coarse grid comes before a fine one. --candidates 16 samples 16 images for each completion and
chooses the one under which the kept part is most likely.

example:
  vqbeam complete runs/fashion --input shoe.png --keep top-half --output shoes.png"""

_GENERATE_EXAMPLE = """

example:
  vqbeam generate runs/fashion --num 50000 --output samples/fashion --format tfrecord"""


def parse_sample(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `sample`."""
    parser.describe("DIR [options]")
    parser.add("DIR", run_location, RUN)
    forms = "a .png (labelled grid), .npz (arrays) or folder (default: samples.png)"
    parser.add("--output", location, forms, metavar="PATH", default="samples.png")
    _add_labels(parser)
    _add_seed(parser)
    again = (
        "sample the images of this .png or .npz again, with the settings that other flags change"
    )
    parser.add("--like", location, again, metavar="FILE")
    flags = _add_settings(parser)
    given = parser.parse_words(words)
    return _settings(given, flags) | {
        "run_dir": given["DIR"],
        "labels": given.get("--label"),
        "seed": given.get("--seed"),
        "like": given.get("--like"),
        "output": given["--output"],
    }


def run_sample(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.sample import sample

    return sample(**arguments)


def parse_generate(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `generate`."""
    rest = "DIR --num N --output FOLDER [options] [Beam options]"
    parser.describe(rest, epilog=BEAM_HELP + _GENERATE_EXAMPLE)
    parser.add("DIR", run_location, RUN)
    parser.add("--num", count, "number of images", metavar="N", required=True)
    folder = "a new folder, or one that the same command has started"
    parser.add("--output", location, folder, metavar="FOLDER", required=True)
    forms = "folders of PNGs with samples.jsonl, one samples.npz, or a TFDS dataset (default: png)"
    parser.add("--format", nonempty, forms, choices=("png", "npz", "tfrecord"), default="png")
    size = "images in a shard, rounded up to full batches (default: 1000)"
    parser.add("--shard-images", count, size, metavar="N", default=1000)
    _add_labels(parser)
    _add_seed(parser)
    flags = _add_settings(parser, without=("num",))
    given = parser.parse_words(words, beam=True)
    beam_args = with_runner(given.get("beam_args", []))
    labelled = any(word.startswith("--labels=") for word in beam_args)
    if labelled and not is_dataflow(beam_args):
        parser.error("--labels labels a job on Dataflow; did you mean --label?")
    return _settings(given, flags) | {
        "run_dir": given["DIR"],
        "num": given["--num"],
        "output": given["--output"],
        "form": given["--format"],
        "labels": given.get("--label"),
        "seed": given.get("--seed"),
        "shard_images": given["--shard-images"],
        "beam_args": beam_args,
    }


def run_generate(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.stages.generate import generate

    return generate(**arguments)


def parse_complete(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `complete`."""
    rest = "DIR --input IMAGE-OR-FOLDER --keep REGION --output PATH [options]"
    parser.describe(rest, epilog=_ORDER)
    parser.add("DIR", run_location, RUN)
    source = "an image or a folder of images; cropped and resized like the run's"
    parser.add("--input", location, source, metavar="PATH", required=True)
    region = "top-half, bottom-half, left-half, right-half, or a mask, an image: white is kept"
    parser.add("--keep", location, region, metavar="REGION", required=True)
    forms = "a .png (all side by side) or a folder (a PNG for each, and completions.jsonl)"
    parser.add("--output", location, forms, metavar="PATH", required=True)
    parser.add("--num", count, "completions of each image (default: 4)", metavar="N", default=4)
    parser.add(
        "--candidates",
        count,
        "candidates for each completion; the most likely is kept (default: 1)",
        metavar="M",
    )
    parser.add("--label", nonempty, "class of the images (default: unknown)", metavar="NAME-OR-ID")
    _add_seed(parser)
    flags = _add_settings(parser, without=("num",))
    given = parser.parse_words(words)
    return _settings(given, flags) | {
        "run_dir": given["DIR"],
        "source": given["--input"],
        "keep": given["--keep"],
        "num": given["--num"],
        "candidates": given.get("--candidates", 1),
        "label": given.get("--label"),
        "seed": given.get("--seed"),
        "output": given["--output"],
    }


def run_complete(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.complete import complete

    return complete(**arguments)


def parse_interpolate(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `interpolate`."""
    rest = "DIR --from LABEL --to LABEL --output FILE.png [options]"
    parser.describe(rest)
    parser.add("DIR", run_location, RUN)
    for flag, place in {"--from": "leftmost", "--to": "rightmost"}.items():
        text = f"class of the {place} column"
        parser.add(flag, nonempty, text, metavar="NAME-OR-ID", required=True)
    parser.add("--output", location, "the .png file to write", metavar="FILE.png", required=True)
    parser.add("--steps", count, "columns, at least 2 (default: 8)", metavar="N", default=8)
    rows = "rows, each with random numbers of its own (default: 4)"
    parser.add("--num", count, rows, metavar="N", default=4)
    _add_seed(parser)
    flags = _add_settings(parser, without=("num",))
    given = parser.parse_words(words)
    if given["--steps"] < 2:
        parser.error("--steps: 1 is not at least 2")
    return _settings(given, flags) | {
        "run_dir": given["DIR"],
        "start": given["--from"],
        "end": given["--to"],
        "steps": given["--steps"],
        "num": given["--num"],
        "seed": given.get("--seed"),
        "output": given["--output"],
    }


def run_interpolate(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.interpolate import interpolate

    return interpolate(**arguments)


def _add_labels(parser: Parser) -> None:
    parser.add(
        "--label",
        nonempty,
        "classes to sample, in turn (default: all of them)",
        nargs="+",
        action="extend",
        metavar="NAME-OR-ID",
    )


def _add_seed(parser: Parser) -> None:
    same = "image i of a seed is always the same image (default: the run's seed)"
    parser.add("--seed", natural, same, metavar="N")


def _add_settings(parser: Parser, without: Sequence[str] = ()) -> dict[str, str]:
    """Adds a flag for each sampler setting; returns the flags by dotted name."""
    group = parser.add_argument_group("settings", "By default those of the run.")
    names = [f"sample.{field.name}" for field in dataclasses.fields(SampleConfig)]
    wanted = [name for name in names if name.partition(".")[2] not in without]
    return parser.add_fields(wanted, "--", group)


def _settings(given: Mapping[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
    """Returns all settings by name, None for those that are not given."""
    settings = {name.partition(".")[2]: given.get(flag) for name, flag in flags.items()}
    changes = {name: value for name, value in settings.items() if value is not None}
    in_range(lambda: SampleConfig(**changes), flags)
    return settings
