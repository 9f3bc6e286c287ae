"""The words of the verbs that draw new images from a run's folder."""

from collections.abc import Sequence
from typing import Any

from configs import SampleConfig
from pipelines.config_flags import in_range
from pipelines.parser import nonempty
from pipelines.verbs import verb_parser


def parse_sample(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `sample`."""
    parser = verb_parser(verb, "DIR [options]")
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
    in_range(lambda: SampleConfig(**changes), flags)
    return settings | {
        "run_dir": given["DIR"],
        "labels": given.get("--label"),
        "seed": given.get("--seed"),
        "output": given.get("--output"),
    }
