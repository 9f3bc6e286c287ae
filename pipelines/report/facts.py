"""Facts about a run that need neither its images nor its models, and comparisons of runs."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vqbeam import configs
from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.inspect import duration
from vqbeam.vqvae.fitting.checkpoints import stored_history
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known about a run without its images and models.

    Attributes:
        root: The run's folder.
        config: The run's config.
        manifests: The manifests of finished stages, by stage.
        histories: The metrics of each epoch so far, by stage.
        vqvae: The result of `vqbeam evaluate` for the model of stage 1, or None.
        prior: The same for stage 2.
    """

    root: str
    config: Config
    manifests: Mapping[str, dict[str, Any]]
    histories: Mapping[str, list[dict[str, float]]]
    vqvae: dict[str, Any] | None = None
    prior: dict[str, Any] | None = None


def read_facts(run: RunFolder) -> Facts:
    """Returns the facts from the manifests, checkpoints and metrics of a run, except damaged ones.

    Raises:
        VqbeamError: There is no run in the folder.
    """
    config = run.load_config()
    manifests = {stage: or_reason(lambda s=stage: run.manifest(s))[0] for stage in STAGES}
    manifests = {stage: manifest for stage, manifest in manifests.items() if manifest}
    histories = {}
    for stage, settings in (("train-vqvae", config.vqvae), ("train-prior", config.prior)):
        if stage in manifests:
            histories[stage] = manifests[stage].get("history", [])
        else:
            found, _ = or_reason(
                lambda s=stage, n=settings.steps_per_epoch: stored_history(run.folder(s), n)
            )
            histories[stage] = found or []
    measured = {n: or_reason(lambda n=n: run.measures(n))[0] for n in ("vqvae", "prior")}
    return Facts(str(run.root), config, manifests, histories, **measured)


def or_reason(make: Callable[[], Any]) -> tuple[Any, str]:
    """Returns the result of `make` and ""; or None and the reason, if it raises a VqbeamError."""
    try:
        return make(), ""
    except VqbeamError as error:
        return None, str(error)


def key_figures(facts: Facts) -> list[tuple[str, str, str]]:
    """Returns the value, the name and the meaning of the most important figures."""
    config, made = facts.config, facts.manifests
    figures = []
    if vqvae := made.get("train-vqvae"):
        psnr = (facts.vqvae or vqvae["measures"])["psnr"]
        meaning = "of held-out reconstructions: 20 looks blurry, 30 is close to the original"
        figures.append((f"{psnr:.1f} dB", "fidelity (PSNR)", meaning))
    of = config.vqvae.num_codes
    if encoded := made.get("encode"):
        used, spread = (
            ", ".join(f"{value:,.0f}" for value in np.atleast_1d(encoded[name]))
            for name in ("codes_used", "perplexity")
        )
        meaning = f"as varied as {spread} codes used equally (perplexity)"
        figures.append((f"{used} of {of:,}", "codes in use", meaning))
    if prior := made.get("train-prior"):
        nats = prior["measures"]["nats_per_code"]
        meaning = f"of the prior at held-out images; guessing evenly costs {math.log(of):.2f}"
        figures.append((f"{nats:.2f} nats", "surprise per code", meaning))
    if made:
        seconds = sum(manifest["seconds"] for manifest in made.values())
        meaning = f"{len(made)} of {len(STAGES)} stages done"
        figures.append((duration(seconds), "time in all", meaning))
    return figures


def comparison(run_dirs: Sequence[str], form: str) -> str:
    """Returns settings and figures of runs, for programs.

    Args:
        run_dirs: Folders of runs.
        form: "json", or "csv" with a row for each name and a column for each run. Both have the
            settings that differ first.

    Raises:
        VqbeamError: A folder holds no run.
    """
    facts = [read_facts(RunFolder(place, remember=True)) for place in run_dirs]
    settings = [configs.typed_settings(each.config) for each in facts]
    figures = [_numbers(each) for each in facts]
    differing = [row[0] for row in differing_settings(facts)]
    if form == "json":
        runs = [
            {"run": each.root, "preset": each.config.name, "settings": own, "figures": found}
            for each, own, found in zip(facts, settings, figures, strict=True)
        ]
        return json.dumps({"differing": differing, "runs": runs}, indent=1, ensure_ascii=False)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["name", *(each.root for each in facts)])
    rows.writerow(["preset", *(each.config.name for each in facts)])
    names = [*differing, *(name for name in settings[0] if name not in differing)]
    rows.writerows([name, *(own[name] for own in settings)] for name in names)
    for name in dict.fromkeys(name for found in figures for name in found):
        rows.writerow([name, *(found.get(name, "") for found in figures)])
    return table.getvalue().rstrip()


def _numbers(facts: Facts) -> dict[str, float]:
    """Returns all figures of a run by dotted names, such as `train-vqvae.measures.psnr`."""
    found: dict[str, float] = {}

    def add(prefix, values):
        for name, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[prefix + name] = value
            elif name in ("perplexity", "codes_used") and isinstance(value, list):
                add(f"{prefix}{name}.", dict(zip(map(str, range(len(value))), value, strict=True)))

    for stage, manifest in facts.manifests.items():
        left_out = ("inputs", "made_from", "outputs", "settings")
        add(f"{stage}.", {k: v for k, v in manifest.items() if k not in left_out})
    for name in ("vqvae", "prior"):
        add(f"evaluation.{name}.", getattr(facts, name) or {})
    return found


def preset_settings(config: Config) -> dict[str, str] | None:
    """Returns the settings of a run's preset, or None if it is not a built-in preset."""
    is_known = config.name in configs.preset_names()
    return configs.typed_settings(configs.load_preset(config.name)) if is_known else None


def differing_settings(facts: Sequence[Facts]) -> list[list[str]]:
    """Returns the settings that differ among runs: the name, and the value in each run."""
    settings = [configs.typed_settings(each.config) for each in facts]
    rows = [[name, *(of[name] for of in settings)] for name in settings[0]]
    return [row for row in rows if len(set(row[1:])) > 1]
