"""The grammar of the command line: words in, a checked `Command` out. Starts nothing."""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import configs
from configs import SECTIONS, Config, SampleConfig, VqbeamError
from pipelines.beam_flags import with_runner
from pipelines.parser import Parser, UsageError, count, nonempty

STAGES = ("prepare", "train-vqvae", "encode", "train-prior", "sample")

VERBS = {
    "run": "take a dataset to new images: all stages as one Beam pipeline",
    "prepare": "write the images of a dataset, cropped and resized, as TFRecords",
    "train-vqvae": "train the VQ-VAE on the prepared images",
    "encode": "turn every image into a grid of codes, as TFRecords",
    "train-prior": "train the transformer prior on the codes",
    "sample": "draw new images from a trained run",
    "reconstruct": "draw held-out images above their reconstructions",
    "evaluate": "measure a trained run on all of its held-out images",
    "inspect": "show what is in a run: stages, sizes, losses, codebook use",
    "gradients": "show which part of a model the gradient of each loss reaches",
    "presets": "list the presets, a line each",
}

_TOP_DESCRIPTION = """\
Learns to draw images like those of a dataset: a VQ-VAE turns them into grids of codes,
a transformer learns the codes. Every stage scales with Apache Beam.

verbs:
{verbs}

example:
  vqbeam run glyphs --run-dir runs/glyphs
  vqbeam sample runs/glyphs --num 26 --output letters.png

"vqbeam VERB --help" says more about a verb."""

_BEAM_HELP = """\
Beam options:
  Every option of Apache Beam is passed on to Beam, for example
    --direct_num_workers 4 --direct_running_mode multi_threading
    --runner DataflowRunner --project P --region R --temp_location gs://BUCKET/tmp
  Without --runner the work is done on this machine, by Beam's FnApiRunner.

example:
  vqbeam {verb} glyphs --run-dir runs/glyphs --vqvae.num-codes 128 --seed 1"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user asked for.

    Attributes:
        verb: One of `VERBS`.
        arguments: The keyword arguments of the function that does the verb's work.
    """

    verb: str
    arguments: dict[str, Any]


def parse(argv: Sequence[str]) -> Command:
    """Returns the command that the words of a command line stand for.

    Args:
        argv: The words behind `vqbeam`.

    Raises:
        UsageError: A verb or flag is unknown, or something is missing or malformed.
        VqbeamError: The preset does not exist, or a value is out of its range.
        SystemExit: Help or the version was asked for, and has been printed.
    """
    if not argv:
        raise UsageError(_top_parser().format_help().rstrip())
    verb, words = argv[0], argv[1:]
    if verb.startswith("-"):
        _top_parser().parse_words([verb])
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see vqbeam --help"
        raise UsageError(f"vqbeam: unknown verb {verb!r}; {hint}")
    parse_verb = {
        "sample": _parse_sample,
        "reconstruct": _parse_reconstruct,
        "evaluate": _parse_evaluate,
        "inspect": _parse_inspect,
        "gradients": _parse_gradients,
        "presets": _parse_presets,
    }
    if verb in parse_verb:
        return Command(verb, parse_verb[verb](words))
    return Command(verb, _parse_stages(verb, words))


def _parse_stages(verb: str, words: Sequence[str]) -> dict[str, Any]:
    rest = "PRESET --run-dir DIR [--smoke] [--SECTION.FIELD VALUE ...] [Beam options]"
    parser = _verb_parser(verb, rest, epilog=_BEAM_HELP.format(verb=verb))
    parser.add("PRESET", nonempty, "a name from `vqbeam presets`, or a .py file that sets CONFIG")
    folder = "the run's folder; made if it is not there"
    parser.add("--run-dir", nonempty, folder, metavar="DIR", required=True)
    parser.add_argument(
        "--smoke",
        dest="--smoke",
        action="store_true",
        help="shrink the preset to run in seconds; its pictures are gray",
    )
    flags = _add_config(parser, SECTIONS)

    given = parser.parse_words(words, beam=True)
    config = configs.load_preset(given["PRESET"])
    if given["--smoke"]:
        config = configs.smoke(config)
    return {
        "config": _overridden(config, given, flags),
        "run_dir": given["--run-dir"],
        "stages": STAGES if verb == "run" else (verb,),
        "beam_args": with_runner(given.get("beam_args", [])),
    }


def _add_config(parser: Parser, sections: Iterable[str]) -> dict[str, str]:
    """Adds `--seed` and a flag for each field of the sections; returns them by dotted name."""
    parser.add("--seed", int, "seed of all random numbers (unset: the preset's)")
    flags = {"seed": "--seed"}
    for section in sections:
        title = f"config: {section} (unset: the preset's value)"
        group = parser.add_argument_group(title, SECTIONS[section].__doc__)
        flags |= parser.add_fields(section, f"--{section}.", group)
    return flags


def _overridden(config: Config, given: Mapping[str, Any], flags: Mapping[str, str]) -> Config:
    """Returns the config with what the given flags set."""
    values = {name: given[flag] for name, flag in flags.items() if flag in given}
    config = _in_range(lambda: configs.override(config, values), flags)
    return _with_whole_path(config)


def _with_whole_path(config: Config) -> Config:
    """Returns the config with a local folder of images named from the root.

    A run may be gone on with from another working directory.
    """
    kind, _, path = config.data.source.partition(":")
    if kind != "folder" or "://" in path:
        return config
    whole = os.path.abspath(os.path.expanduser(path))
    return configs.override(config, {"data.source": f"folder:{whole}"})


def _parse_sample(words: Sequence[str]) -> dict[str, Any]:
    parser = _verb_parser("sample", "DIR [options]")
    parser.add("DIR", nonempty, "the run's folder")
    forms = "a .png (labelled grid), a .npz (arrays) or a folder (unset: samples.png)"
    parser.add("--output", nonempty, forms, metavar="PATH")
    parser.add(
        "--label",
        nonempty,
        "the classes to draw, in turn (unset: all of them)",
        nargs="+",
        action="extend",
        metavar="NAME-OR-ID",
    )
    parser.add("--seed", int, "image i of a seed is always the same image")
    group = parser.add_argument_group("settings", "What is unset is as the run's config says.")
    flags = parser.add_fields("sample", "--", group)

    given = parser.parse_words(words)
    settings = {name.partition(".")[2]: given.get(flag) for name, flag in flags.items()}
    changes = {name: value for name, value in settings.items() if value is not None}
    _in_range(lambda: SampleConfig(**changes), flags)
    return settings | {
        "run_dir": given["DIR"],
        "labels": given.get("--label"),
        "seed": given.get("--seed"),
        "output": given.get("--output"),
    }


def _parse_reconstruct(words: Sequence[str]) -> dict[str, Any]:
    parser = _verb_parser("reconstruct", "DIR --output FILE.png [--num N]")
    parser.add("DIR", nonempty, "the run's folder")
    parser.add("--output", nonempty, "the .png file to write", metavar="FILE.png", required=True)
    parser.add("--num", count, "images to draw (default: 16)", metavar="N", default=16)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"], "num": given["--num"]}


def _parse_evaluate(words: Sequence[str]) -> dict[str, Any]:
    parser = _verb_parser("evaluate", "DIR [--features classifier|inception]")
    parser.add("DIR", nonempty, "the run's folder")
    parser.add(
        "--features",
        str,
        "what the Fréchet distance compares: features of a classifier trained on the run's "
        "images (default), or of Keras's InceptionV3, whose weights are downloaded",
        choices=("classifier", "inception"),
        metavar="NAME",
        default="classifier",
    )
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "features": given["--features"]}


def _parse_inspect(words: Sequence[str]) -> dict[str, Any]:
    parser = _verb_parser("inspect", "DIR")
    parser.add("DIR", nonempty, "the run's folder")
    return {"run_dir": parser.parse_words(words)["DIR"]}


def _parse_gradients(words: Sequence[str]) -> dict[str, Any]:
    parser, flags = _gradients_parser()
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
        "config": None if is_run else _overridden(_preset_of(place), given, flags),
        "run_dir": place if is_run else None,
        "output": given["--output"],
        "straight_through": not both,
        "steps": given.get("--steps", 200),
    }


def _gradients_parser() -> tuple[Parser, dict[str, str]]:
    rest = "PRESET-OR-DIR [--no-straight-through] [options] [--SECTION.FIELD VALUE ...]"
    parser = _verb_parser("gradients", rest)
    kinds = "a preset, for a fresh model on images from its source; or the folder of a trained run"
    parser.add("PRESET-OR-DIR", nonempty, kinds)
    file = "the .png file to write (default: gradients.png)"
    parser.add("--output", nonempty, file, metavar="FILE.png", default="gradients.png")
    parser.add_argument(
        "--no-straight-through",
        dest="--no-straight-through",
        action="store_true",
        help="set the model without an estimator beside it, and train both",
    )
    parser.add("--steps", count, "training steps of each of them (default: 200)", metavar="N")
    return parser, _add_config(parser, ("data", "vqvae"))


def _is_folder(place: str) -> bool:
    return "://" in place or os.path.isdir(os.path.expanduser(place))


def _preset_of(place: str) -> Config:
    """Returns the preset of a name that may have been meant for a folder."""
    try:
        return configs.load_preset(place)
    except VqbeamError as error:
        said = str(error) if place.endswith(".py") else f"there is no folder {place!r}, and {error}"
        raise VqbeamError(said) from None


def _parse_presets(words: Sequence[str]) -> dict[str, Any]:
    _verb_parser("presets", "").parse_words(words)
    return {}


def _verb_parser(verb: str, usage: str, **texts: str) -> Parser:
    summary = f"{VERBS[verb][:1].upper()}{VERBS[verb][1:]}."
    return Parser(verb, usage, description=summary, **texts)


def _top_parser() -> Parser:
    verbs = "\n".join(f"  {verb:<13} {summary}" for verb, summary in VERBS.items())
    return Parser("", "VERB ...", description=_TOP_DESCRIPTION.format(verbs=verbs))


def _in_range(build: Callable[[], Any], flags: Mapping[str, str]) -> Any:
    """Returns `build()`; what it says of a field, it says of the flag that sets the field."""
    try:
        return build()
    except VqbeamError as error:
        message = re.sub(r"[a-z]+\.[a-z_]+", lambda name: flags.get(name[0], name[0]), str(error))
        raise VqbeamError(message) from None
