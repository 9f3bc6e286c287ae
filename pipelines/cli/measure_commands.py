"""Parsers of the commands that measure a run or publish it in another form."""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vqbeam import configs
from vqbeam.configs import Config, SampleConfig, SamplerSettings, VqbeamError
from vqbeam.pipelines.cli.parser import (
    KINDS,
    RUN,
    Parser,
    add_config,
    count,
    in_range,
    location,
    natural,
    nonempty,
    overridden,
    run_location,
)
from vqbeam.pipelines.paths import HUB


def parse_evaluate(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `evaluate`."""
    parser.describe("DIR [options]")
    parser.add("DIR", location, "the run's folder")
    parser.add(
        "--features",
        str,
        "what the Fréchet distance compares: features of a classifier trained on the run's "
        "images (default), or of the InceptionV3 of published distances, which is downloaded",
        choices=("classifier", "inception"),
        metavar="NAME",
        default="classifier",
    )
    stages = "vqvae, prior, or all that are trained (default)"
    choices = ("all", "vqvae", "prior")
    parser.add("--stage", str, stages, choices=choices, metavar="STAGE")
    number = "number of samples (default: 10,000, or 2,000 in a sweep)"
    parser.add("--num", count, number, metavar="N")
    parser.add(
        "--seed",
        natural,
        "seed of the samples and of the choice of real images (default: the run's)",
        metavar="N",
    )
    parser.add(
        "--sweep",
        nonempty,
        "measure all combinations of these sampler settings instead, for example "
        "temperature=0.8,0.9,1 guidance=1,2",
        nargs="+",
        metavar="SETTING=VALUE,...",
    )
    parser.add_switch("--store", "make the best settings of the sweep the run's defaults")
    given = parser.parse_words(words)
    sweep = _swept(parser, given.get("--sweep", []))
    _check_evaluate(parser, given, sweep)
    return {
        "run_dir": given["DIR"],
        "features": given["--features"],
        "stage": given.get("--stage", "all"),
        "num": given.get("--num"),
        "seed": given.get("--seed"),
        "sweep": sweep or None,
        "store": given["--store"],
    }


def _check_evaluate(parser: Parser, given: Mapping[str, Any], sweep: Mapping[str, Any]) -> None:
    """Raises a UsageError for flags that do not go together."""
    if given["--store"] and not sweep:
        parser.error("--store stores the best settings of a sweep; add --sweep")
    if "--stage" in given and sweep:
        parser.error("--stage and --sweep exclude each other; a sweep measures the prior")
    for flag in ("--num", "--seed"):
        if flag in given and given.get("--stage") == "vqvae":
            parser.error(f"{flag} is for samples of the prior, and --stage vqvae takes none")


def run_evaluate(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.evaluation.evaluate import evaluate

    return evaluate(**arguments)


def _swept(parser: Parser, words: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the values of each setting of a sweep, in the types of the fields of SampleConfig.

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
    parser.add("DIR", run_location, RUN)
    place = "an image, or a folder with images at any depth"
    parser.add("--input", location, place, metavar="IMAGE-OR-FOLDER", required=True)
    parser.add("--label", nonempty, "class of all the images (default: none)", metavar="NAME-OR-ID")
    lines = "file with a line of JSON for each image (default: standard output)"
    parser.add("--output", location, lines, metavar="FILE.jsonl")
    parser.add_switch("--sort", "the least likely images first")
    flags = parser.add_fields(["sample.precision"], "--", None)
    given = parser.parse_words(words)
    in_range(lambda: SampleConfig(precision=given.get("--precision", "exact")), flags)
    return {
        "run_dir": given["DIR"],
        "input": given["--input"],
        "label": given.get("--label"),
        "output": given.get("--output"),
        "precision": given.get("--precision"),
        "sort": given["--sort"],
    }


def run_score(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.score import score

    return score(**arguments)


def parse_export(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `export`."""
    parser.describe("DIR --output FOLDER [--format FORMAT]")
    parser.add("DIR", run_location, RUN)
    folder = "the folder to write; for TensorFlow Serving, its name is the version: models/NAME/1"
    parser.add("--output", location, folder, metavar="FOLDER", required=True)
    forms = "a SavedModel (default), or weights that diffusers loads; the latter of a resnet"
    choices = ("savedmodel", "safetensors")
    parser.add("--format", nonempty, forms, choices=choices, default="savedmodel")
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"], "form": given["--format"]}


def run_export(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.export import export

    return export(**arguments)


def parse_export_codes(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `export_codes`."""
    parser.describe("DIR --output FILE")
    parser.add("DIR", location, "the run's folder")
    file = "the .npz or .parquet file to write"
    parser.add("--output", location, file, metavar="FILE", required=True)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"]}


def run_export_codes(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.sampling.export import export_codes

    return export_codes(**arguments)


def parse_reconstruct(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `reconstruct`."""
    parser.describe("DIR --output FILE.png [--num N]")
    parser.add("DIR", location, "the run's folder")
    parser.add("--output", location, "the .png file to write", metavar="FILE.png", required=True)
    parser.add("--num", count, "number of images (default: 16)", metavar="N", default=16)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"], "num": given["--num"]}


def run_reconstruct(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.evaluation.reconstructions import reconstruct

    return reconstruct(**arguments)


def parse_push(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `push`."""
    example = "\nexample:\n  vqbeam push runs/fashion hf://me/fashion"
    parser.describe("DIR TARGET [--private]", epilog=example)
    parser.add("DIR", location, "the run's folder")
    parser.add("TARGET", run_location, "hf://USER/NAME, or a new folder")
    parser.add_switch("--private", "create the repository as a private one")
    given = parser.parse_words(words)
    if given["--private"] and not given["TARGET"].startswith(HUB):
        parser.error("--private is for hf://USER/NAME")
    return {"run_dir": given["DIR"], "target": given["TARGET"], "private": given["--private"]}


def run_push(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.hub import push

    return push(**arguments)


def parse_inspect(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `run_inspect`."""
    parser.describe("DIR [DIR ...] [--json | --csv]")
    parser.add("DIR", run_location, f"{RUN}; several to compare", nargs="+")
    helps = {
        "json": "print settings and figures as JSON, for programs",
        "csv": "the same as a table, with a column for each run",
    }
    for form, text in helps.items():
        parser.add_switch(f"--{form}", text)
    given = parser.parse_words(words)
    forms = [form for form in helps if given[f"--{form}"]]
    if len(forms) > 1:
        parser.error("--json and --csv exclude each other")
    if len(given["DIR"]) > 1 and not forms:
        parser.error("several folders need --json or --csv; vqbeam report compares them on a page")
    return {"run_dirs": given["DIR"], "form": forms[0] if forms else None}


def run_inspect(run_dirs: Sequence[str], form: str | None) -> str:
    """Does the work; its libraries load only now."""
    if form:
        from vqbeam.pipelines.report.facts import comparison

        return comparison(run_dirs, form)
    from vqbeam.pipelines.inspect import describe

    return describe(run_dir=run_dirs[0])


def parse_report(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `report`."""
    parser.describe("DIR [DIR ...] [--output FILE.html]")
    parser.add("DIR", location, "the run's folder; several are shown side by side", nargs="+")
    file = "the .html file to write (default: DIR/report.html)"
    parser.add("--output", location, file, metavar="FILE.html")
    given = parser.parse_words(words)
    if len(given["DIR"]) > 1 and "--output" not in given:
        parser.error("several folders need --output FILE.html")
    return {"run_dirs": given["DIR"], "output": given.get("--output")}


def run_report(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.report.page import report

    return report(**arguments)


def parse_studio(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `studio`."""
    parser.describe("DIR [--port N]")
    parser.add("DIR", run_location, RUN)
    parser.add("--port", _port, "port on this machine (default: 7860)", metavar="N", default=7860)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "port": given["--port"]}


def _port(text: str) -> int:
    if count(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, from 1 to 65535")
    return int(text)


def run_studio(**arguments: Any) -> None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.studio import studio

    studio(**arguments)


def parse_presets(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `describe`."""
    parser.describe("[PRESET]")
    kinds = "a name, or a .py file that sets CONFIG: shows all its settings"
    parser.add("PRESET", nonempty, kinds, nargs="?")
    return {"preset": parser.parse_words(words).get("PRESET")}


def run_presets(preset: str | None = None) -> str:
    """Returns a line with name and summary for each preset, or the settings of one preset.

    Args:
        preset: A name or the path of a .py file; see `configs.load_preset`.

    Raises:
        VqbeamError: There is no such preset.
    """
    if preset is not None:
        return _settings(preset)
    names = configs.preset_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {configs.preset_summary(name)}" for name in names)


def _settings(preset: str) -> str:
    """Returns a line for each setting of a preset: its flag, value and meaning."""
    values = configs.typed_settings(configs.load_preset(preset))
    rows = [
        (f"--{name.replace('_', '-')}", values[name], field.metadata["help"])
        for name, field, _ in configs.field_types()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{flag:<{widths[0]}}  {value:<{widths[1]}}  {text}" for flag, value, text in rows]
    return "\n".join([configs.preset_summary(preset), *lines])


def parse_gradients(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `gradients`."""
    flags = _add_gradients(parser)
    given = parser.parse_words(words)
    both = given["--no-straight-through"]
    if "--steps" in given and not both:
        parser.error("--steps needs --no-straight-through")
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
    parser.add_switch(
        "--no-straight-through",
        "compare with the model without a gradient estimator, training both",
    )
    parser.add("--steps", count, "training steps of each model (default: 200)", metavar="N")
    return add_config(parser, ("data", "vqvae"))


def _is_folder(place: str) -> bool:
    return "://" in place or os.path.isdir(os.path.expanduser(place))


def _preset_of(place: str) -> Config:
    """Returns a preset; an unknown name may be a mistyped folder, and the error says so."""
    try:
        return configs.load_preset(place)
    except VqbeamError as error:
        said = str(error) if place.endswith(".py") else f"there is no folder {place!r}, and {error}"
        raise VqbeamError(said) from None
