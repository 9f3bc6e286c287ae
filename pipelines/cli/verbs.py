"""The verbs of the command line: what each does, who reads its words, and who does its work."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from vqbeam.pipelines.cli.parser import Parser


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        summary: What it does, for the help.
        grammar: MODULE:FUNCTION of `pipelines` that turns the verb and the words behind it into
            the keyword arguments of the next.
        work: MODULE:FUNCTION of `pipelines` that does the work; a text that it returns is printed.
        needs: The stages of a run that must be done.
        outputs: The endings that the file to write may have; "" stands for a folder.
    """

    summary: str
    grammar: str
    work: str
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


_MODELS = ("train-vqvae", "train-prior")
_STAGES = {"grammar": "cli.stage_commands:parse_stages", "work": "run:run_stages"}

VERBS = {
    "run": Verb("take a dataset to new images: all stages as one Beam pipeline", **_STAGES),
    "prepare": Verb("write the images of a dataset, cropped and resized, as TFRecords", **_STAGES),
    "train-vqvae": Verb("train the VQ-VAE on the prepared images", **_STAGES),
    "encode": Verb("turn every image into a grid of codes, as TFRecords", **_STAGES),
    "train-prior": Verb("train the transformer prior on the codes", **_STAGES),
    "sample": Verb(
        "draw new images from a trained run",
        "cli.sampling_commands:parse_sample",
        "sampling.sample:sample",
        needs=_MODELS,
        outputs=(".png", ".npz", ""),
    ),
    "generate": Verb(
        "draw very many images, as a Beam pipeline",
        "cli.sampling_commands:parse_generate",
        "stages.generate:generate",
        needs=_MODELS,
    ),
    "complete": Verb(
        "draw the missing part of images, several times",
        "cli.sampling_commands:parse_complete",
        "sampling.complete:complete",
        needs=_MODELS,
        outputs=(".png", ""),
    ),
    "interpolate": Verb(
        "draw images on the way from one class to another",
        "cli.sampling_commands:parse_interpolate",
        "sampling.interpolate:interpolate",
        needs=_MODELS,
        outputs=(".png",),
    ),
    "reconstruct": Verb(
        "draw held-out images above their reconstructions",
        "cli.report_commands:parse_reconstruct",
        "evaluation.reconstructions:reconstruct",
        needs=("prepare", "train-vqvae"),
        outputs=(".png",),
    ),
    "evaluate": Verb(
        "measure a trained run on all of its held-out images",
        "cli.measure_commands:parse_evaluate",
        "evaluation.evaluate:evaluate",
        needs=("prepare", "train-vqvae"),
    ),
    "score": Verb(
        "tell how likely a trained run finds images of your own",
        "cli.measure_commands:parse_score",
        "sampling.score:score",
        needs=_MODELS,
    ),
    "export": Verb(
        "write a trained run as a SavedModel, which needs neither vqbeam nor Keras",
        "cli.measure_commands:parse_export",
        "sampling.export:export",
        needs=_MODELS,
    ),
    "inspect": Verb(
        "show what is in a run: stages, sizes, losses, codebook use",
        "cli.report_commands:parse_inspect",
        "inspect:describe",
    ),
    "gradients": Verb(
        "show which part of a model the gradient of each loss reaches",
        "cli.report_commands:parse_gradients",
        "gradients:gradients",
        outputs=(".png",),
    ),
    "presets": Verb(
        "list the presets, or the settings of one",
        "cli.report_commands:parse_presets",
        "inspect:describe_presets",
    ),
}


def function(name: str) -> Callable[..., Any]:
    """Returns the function that MODULE:FUNCTION names; its module loads only now."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"vqbeam.pipelines.{module}"), attribute)


def verb_parser(verb: str, usage: str, **texts: str) -> Parser:
    """Returns a parser for the words behind a verb."""
    summary = VERBS[verb].summary
    return Parser(verb, usage, description=f"{summary[:1].upper()}{summary[1:]}.", **texts)
