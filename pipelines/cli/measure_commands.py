"""The words of the verbs that measure a run, or take it elsewhere."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from vqbeam import configs
from vqbeam.configs import SampleConfig, SamplerSettings
from vqbeam.pipelines.cli.parser import KINDS, Parser, count, location, natural, nonempty


def parse_evaluate(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `evaluate`."""
    parser.describe("DIR [options]")
    parser.add("DIR", location, "the run's folder")
    parser.add(
        "--features",
        str,
        "what the Fréchet distance compares: features of a classifier trained on the run's "
        "images (default), or of Keras's InceptionV3, whose weights are downloaded",
        choices=("classifier", "inception"),
        metavar="NAME",
        default="classifier",
    )
    stages = "vqvae, prior, or all that are trained (default)"
    choices = ("all", "vqvae", "prior")
    parser.add("--stage", str, stages, choices=choices, metavar="STAGE")
    number = "images to draw from the prior (default: 10,000, or 2,000 in a sweep)"
    parser.add("--num", count, number, metavar="N")
    parser.add("--seed", natural, "seed of what is drawn (unset: the run's)", metavar="N")
    parser.add(
        "--sweep",
        nonempty,
        "measure all combinations of these settings of the sampler instead, for example "
        "temperature=0.8,0.9,1 guidance=1,2",
        nargs="+",
        metavar="SETTING=VALUE,...",
    )
    parser.add_argument(
        "--store",
        dest="--store",
        action="store_true",
        help="have the run draw with the best settings of the sweep from now on",
    )
    given = parser.parse_words(words)
    sweep = _swept(parser, given.get("--sweep", []))
    if given["--store"] and not sweep:
        parser.error("--store stores the best settings of a sweep; add --sweep")
    if "--stage" in given and sweep:
        parser.error("--stage and --sweep exclude each other; a sweep measures the prior")
    for flag in ("--num", "--seed"):
        if flag in given and given.get("--stage") == "vqvae":
            parser.error(f"{flag} is of what the prior draws, and --stage vqvae draws nothing")
    return {
        "run_dir": given["DIR"],
        "features": given["--features"],
        "stage": given.get("--stage", "all"),
        "num": given.get("--num"),
        "seed": given.get("--seed"),
        "sweep": sweep or None,
        "store": given["--store"],
    }


def run_evaluate(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.evaluation.evaluate import evaluate

    return evaluate(**arguments)


def _swept(parser: Parser, words: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the values of each setting, in the types of the fields of SampleConfig.

    Raises:
        VqbeamError: A value is out of its range.
    """
    settings = {f"sample.{field.name}" for field in dataclasses.fields(SamplerSettings)}
    kinds = {field.name: kind for name, field, kind in configs.field_types() if name in settings}
    values: dict[str, list[Any]] = {}
    for word in words:
        name, equals, listed = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in kinds:
            known = ", ".join(kinds)
            parser.error(f"--sweep: {word!r} is not SETTING=VALUE,...; the settings are {known}")
        for text in listed.split(","):
            try:
                value = KINDS[kinds[name]][0](text)
            except argparse.ArgumentTypeError as error:
                parser.error(f"--sweep: {word}: {error}")
            SampleConfig(**{name: value})
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return values


def parse_score(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `score`."""
    parser.describe("DIR --input IMAGE-OR-FOLDER [options]")
    parser.add("DIR", location, "the run's folder")
    place = "an image, or a folder with images at any depth"
    parser.add("--input", location, place, metavar="IMAGE-OR-FOLDER", required=True)
    parser.add("--label", nonempty, "the class of them all (unset: none)", metavar="NAME-OR-ID")
    lines = "file for a line of JSON for each image (unset: standard output)"
    parser.add("--output", location, lines, metavar="FILE.jsonl")
    parser.add_argument(
        "--sort", dest="--sort", action="store_true", help="the least likely images first"
    )
    given = parser.parse_words(words)
    return {
        "run_dir": given["DIR"],
        "input": given["--input"],
        "label": given.get("--label"),
        "output": given.get("--output"),
        "sort": given["--sort"],
    }


def run_score(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.score import score

    return score(**arguments)


def parse_export(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `export`."""
    parser.describe("DIR --output FOLDER")
    parser.add("DIR", location, "the run's folder")
    folder = "the folder to write; for TensorFlow Serving, its name is the version: models/NAME/1"
    parser.add("--output", location, folder, metavar="FOLDER", required=True)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"]}


def run_export(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.export import export

    return export(**arguments)
