"""The command that writes a page about trained runs: one file that needs no server or network.

A part that cannot be made, such as the pictures of a run whose images are elsewhere, is left out,
and the page says why.
"""

import base64
import dataclasses
import datetime
import io
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import keras
import matplotlib
import numpy as np
from etils import epath
from PIL import Image

from vqbeam.configs import Config, VqbeamError, first_line, typed_settings
from vqbeam.pipelines.evaluation.evaluate import vqvae_rows
from vqbeam.pipelines.evaluation.reference import FIGURES
from vqbeam.pipelines.inspect import duration
from vqbeam.pipelines.report.advice import findings
from vqbeam.pipelines.report.charts import Chart, bar_chart, line_chart
from vqbeam.pipelines.report.facts import (
    Facts,
    differing_settings,
    key_figures,
    or_reason,
    preset_settings,
    read_facts,
)
from vqbeam.pipelines.sampling.api import Run
from vqbeam.vqvae.figures import picture
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.metrics import count_codes
from vqbeam.vqvae.storage.files import modified, write_bytes
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import damaged_records, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, RunFolder
from vqbeam.vqvae.training import reconstruct

_TEMPLATE = pathlib.Path(__file__).parent / "page.html"
# Bytes of all pictures on a page. Base64 adds a third, and the page stays below 5 MB.
_BUDGET = 3_300_000
_LARGEST_SIDE = 1600
_HELD_OUT = 16
# Codes are counted over this many grids, and this many codes of each kind are shown.
_MOST_GRIDS = 50_000
_CODES_SHOWN = 16
# The absolute error of a pixel, out of 255, that gets the brightest colour.
_LARGEST_ERROR = 100
# The share of the time that writing pages may take, and the interval at which a browser reloads.
_LARGEST_SHARE = 0.05
_RELOAD_SECONDS = 30

# For each row of `vqvae_rows`, its meaning and the value for real images.
_STAGE_1 = {
    "MSE": ("mean squared error of a pixel", "0"),
    "NMSE": ("the same as a share of the variance: 1 is what a single grey would reach", "0"),
    "PSNR": ("the same in decibels: 20 looks blurry, 30 is close to the original", "∞"),
    "SSIM": ("how well local structure agrees", "1"),
    "Fréchet distance": ("how far the set is from the originals, in a network's features", "0"),
    "perplexity": ("how many codes would be as varied if all were used equally", "–"),
    "codes used": ("codes that occur at all", "–"),
    "size of the codes": ("what is left of an image", "–"),
    "compression": ("size of the pixels to that of the codes", "1 to 1"),
}
_STAGE_2 = {
    "frechet": "how far the set is from held-out images, in a network's features; lower is better",
    "precision": "share that looks like a held-out image",
    "recall": "share of the held-out images that look like one of the set: how varied it is",
    "density": "how many held-out images one of the set looks like on average, divided by 3",
    "coverage": "share of the held-out images that one of the set looks like",
    "agreement": "share in which a classifier sees the requested class",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture inside the page: a data URI, its alternative text, and its size."""

    uri: str
    alt: str
    width: int
    height: int


def report(run_dirs: Sequence[str], output: str | None = None) -> str:
    """Writes a page about one run, or several side by side; returns a line that says where.

    Args:
        run_dirs: Folders of runs.
        output: The .html file to write; None for `report.html` in the folder of the only run.

    Raises:
        VqbeamError: A folder holds no run.
    """
    path, size = write_page(run_dirs, output)
    return f"report, {size / 1e6:.1f} MB: {path}"


def write_page(
    run_dirs: Sequence[str],
    output: str | None = None,
    *,
    reload_seconds: int | None = None,
    slow_parts: Callable[[RunFolder, Facts, int], dict[str, Any]] | None = None,
) -> tuple[epath.Path, int]:
    """Writes a page about runs atomically; returns its path and its size in bytes.

    Args:
        run_dirs: Folders of runs.
        output: See `report`.
        reload_seconds: Seconds after which a browser reloads the page; None for never.
        slow_parts: Function like `_slow_parts`, which makes them with the finished models.
    """
    runs = [RunFolder(place, remember=True) for place in run_dirs]
    facts = [read_facts(run) for run in runs]
    path = epath.Path(output).expanduser() if output else runs[0].root / "report.html"
    budget = _BUDGET // len(runs)
    views = []
    for run, known in zip(runs, facts, strict=True):
        slow = (slow_parts or _slow_parts)(run, known, budget)
        views.append(_view(run, known, facts, budget, slow))
    html = render(views, differing_settings(facts), reload_seconds).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, html)
    return path, len(html)


class LivePage(keras.callbacks.Callback):
    """Writes `DIR/report.html` when an epoch begins, so that a browser can follow the training.

    At that time, the last checkpoint holds the previous epoch. Pages are skipped if they would take
    more than a twentieth of the time. A page that cannot be written causes a one-line warning.

    Args:
        run_path: The run's folder.
        stage: The stage that trains.
    """

    def __init__(self, run_path: str, stage: str):
        super().__init__()
        self.run, self.stage = RunFolder(run_path), stage
        self.originals = self.kept = None
        self.due, self.failed = 0.0, False

    def on_epoch_begin(self, epoch, logs=None):
        """Writes the page if it is time."""
        begun = time.monotonic()
        if self.failed or begun < self.due:
            return
        self.failed = not written(self.run, _RELOAD_SECONDS, self._slow_parts)
        now = time.monotonic()
        self.due = now + (now - begun) / _LARGEST_SHARE

    def _slow_parts(self, run: RunFolder, facts: Facts, budget: int) -> dict[str, Any]:
        if self.stage == "train-vqvae":
            if self.originals is None:
                self.originals = held_out_images(run)
            copies = reconstruct(self.model, self.originals)
            return _slow_parts_in_training(self.originals, copies, budget)
        if self.kept is None:  # the epochs of the prior change nothing about them
            self.kept = _slow_parts(run, facts, budget)
        return self.kept


def written(run: RunFolder, reload_seconds: int | None = None, slow_parts=None) -> bool:
    """Returns whether the page of a run was written; prints a warning if it was not.

    Args:
        run: The run.
        reload_seconds: Seconds after which a browser reloads the page; None for a final page.
        slow_parts: See `write_page`.
    """
    try:
        write_page([str(run.root)], reload_seconds=reload_seconds, slow_parts=slow_parts)
        return True
    except Exception as error:  # a failed page must not end the training
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{run.root}/report.html cannot be written: {reason}", file=sys.stderr)
        return False


def render(
    views: Sequence[dict[str, Any]], differing: list[list[str]], reload_seconds: int | None = None
) -> str:
    """Returns the HTML of the page; all texts of the views are escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(views=views, differing=differing, reload_seconds=reload_seconds)


def _slow_parts(run: RunFolder, facts: Facts, budget: int) -> dict[str, Any]:
    """Returns the parts that need a model or a pass over data, and why missing ones are missing.

    Args:
        run: The run.
        facts: Its facts.
        budget: See `_view`.
    """
    opened = Run(run.root)

    def held_out():
        originals = held_out_images(run)
        return _held_out(originals, opened.reconstruct(originals), budget // 4)

    shown, no_held_out = or_reason(held_out)
    counts, no_counts = or_reason(lambda: _counts(run, facts))
    codes, no_codes = (
        or_reason(lambda: _code_pictures(opened, counts, budget // 8))
        if counts is not None
        else (None, "")
    )
    return {
        "held_out": shown,
        "counts": [] if counts is None else _count_charts(counts),
        "codes": codes or [],
        "missing": {
            "held_out": no_held_out,
            "codes": " ".join(filter(None, (no_counts, no_codes))),
        },
    }


def _slow_parts_in_training(
    originals: np.ndarray, copies: np.ndarray, budget: int
) -> dict[str, Any]:
    """Returns the result of `_slow_parts` while stage 1 is being trained."""
    missing = {"held_out": "", "codes": "Stage 1 is being trained."}
    shown = _held_out(originals, copies, budget // 4)
    return {"held_out": shown, "counts": [], "codes": [], "missing": missing}


def _view(
    run: RunFolder, facts: Facts, all_facts: list[Facts], budget: int, slow: dict[str, Any]
) -> dict[str, Any]:
    """Returns the template's variables for a run.

    Args:
        run: The run.
        facts: Its facts.
        all_facts: The facts of all runs, whose charts share their axes.
        budget: Maximum bytes of all pictures of the run.
        slow: The result of `_slow_parts`.
    """
    found, passed, unchecked = findings(facts)
    samples, no_samples = or_reason(lambda: _samples(run, facts, budget // 2))
    return {
        "root": facts.root,
        "preset": facts.config.name,
        "sentence": _sentence(facts),
        "figures": key_figures(facts),
        "samples": samples,
        **slow,
        "findings": found,
        "has_flags": any(finding.command.startswith("--") for finding in found),
        "passed": passed,
        "unchecked": unchecked,
        "curves": _curves(facts, all_facts),
        "usage": _usage_curve(facts, all_facts),
        "missing": {"samples": no_samples, **slow["missing"]},
        "stage_1": _stage_1(facts),
        "stage_2": _stage_2(facts),
        "nearest": _nearest(run, budget // 8) if facts.prior else None,
        "stages": _stages(run, facts),
        "settings": _settings_table(facts.config),
        "provenance": _provenance(run, facts),
        "commands": _commands(facts),
    }


def _sentence(facts: Facts) -> str:
    """Returns a description of the run for readers who have never seen one."""
    config, prepared = facts.config, facts.manifests.get("prepare")
    height, width, channels = config.image_shape
    size = f"{height}×{width} pixels" + (" of grey" if channels == 1 else "")
    data = f"images of {config.data.source} at {size}"
    if prepared:
        labels = Labels.of(prepared)
        kinds = f", {len(labels.names)} {labels.kind}" if labels.names else ""
        data = f"{prepared['counts']['train']:,} {data}{kinds}"
    return (
        f"A generator of images, trained on {data}. Stage 1 turns an image into codes "
        f"({code_layout(config).describe()}) and back; stage 2, the prior, has learned to write "
        "such codes, which become new images."
    )


def _samples(run: RunFolder, facts: Facts, most_bytes: int) -> Picture:
    path = run.folder("sample") / "samples.png"
    trained = facts.manifests.get("train-prior")
    (*_, (_, resume)) = _commands(facts)
    if run.is_stale("sample"):
        raise VqbeamError(f"The models have changed since the samples were made: {resume}")
    if not path.exists():
        sample = shlex.join(["vqbeam", "sample", str(run.root), "--output", str(path)])
        raise VqbeamError(
            f"No samples yet: {sample}" if trained else f"The prior is not trained yet: {resume}"
        )
    labels = Labels.of(trained) if trained else Labels()
    alt = f"New images of the {labels.kind} {', '.join(labels.names[:30])}" if labels.names else ""
    return _stored_picture(path, alt or "New images", most_bytes)


def _held_out(
    originals: np.ndarray, copies: np.ndarray, most_bytes: int
) -> list[dict[str, Picture]]:
    """Returns held-out images with their reconstructions and error maps."""
    colours = matplotlib.colormaps["inferno"]
    shown = []
    each = most_bytes // (3 * len(originals))
    for number, (original, copy) in enumerate(zip(originals, copies, strict=True), 1):
        error = np.abs(original.astype(float) - copy).mean(axis=-1)
        heat = colours(np.minimum(error / _LARGEST_ERROR, 1), bytes=True)[..., :3]
        pictures = {
            "original": (original, f"Held-out image {number}"),
            "reconstruction": (copy, f"Reconstruction of held-out image {number}"),
            "error": (
                heat,
                f"Error of reconstruction {number}: {error.mean():.1f} of 255 on average",
            ),
        }
        shown.append(
            {name: _picture(picture(image), alt, each) for name, (image, alt) in pictures.items()}
        )
    return shown


def held_out_images(run: RunFolder) -> np.ndarray:
    """Returns the first held-out images, uint8 [N, H, W, C]."""
    if run.is_elsewhere("prepare"):
        raise VqbeamError(
            f"The images of this run are not here; put them into {run.folder('prepare')}, or make "
            f"them again: vqbeam prepare PRESET --run-dir {shlex.quote(str(run.root))}"
        )
    prepared = run.require("prepare")
    last = min(_HELD_OUT, prepared["counts"]["validation"])
    with damaged_records(run.folder("prepare")):
        split = read_split(open_dataset(run.folder("prepare")), "validation", last=last)
        return np.stack([example["image"] for example in split.as_numpy_iterator()])


def _counts(run: RunFolder, facts: Facts) -> np.ndarray:
    """Returns the number of occurrences of each code in the first training images, [levels, K]."""
    if run.is_elsewhere("encode"):
        raise VqbeamError(
            f"The codes of this run are not here; put them into {run.folder('encode')}, or make "
            f"them again: vqbeam encode PRESET --run-dir {shlex.quote(str(run.root))}"
        )
    run.require("encode")
    layout = code_layout(facts.config)
    counts = np.zeros((layout.levels, layout.num_codes), np.int64)
    with damaged_records(run.folder("encode")):
        split = read_split(open_dataset(run.folder("encode")), "train").take(_MOST_GRIDS)
        for codes in split.map(lambda example: example["codes"]).batch(1000).as_numpy_iterator():
            counts += count_codes(codes.astype("int64"), layout)
    return counts


def _code_pictures(run: Run, counts: np.ndarray, most_bytes: int) -> list[list[tuple[str, Any]]]:
    """Returns, for each level, pictures of the codes used most, least and never, by title.

    A code is shown as the image with this code at every position. If there are several levels, the
    other levels have their most frequent code.
    """
    layout = code_layout(run.config)
    levels = []
    for level, of_level in enumerate(counts):
        order = np.argsort(-of_level, kind="stable")
        used = order[: np.count_nonzero(of_level)]
        kinds = {
            "Used most": used[:_CODES_SHOWN],
            "Used least": used[_CODES_SHOWN:][::-1][:_CODES_SHOWN],
            "Never used": order[len(used) :][:_CODES_SHOWN],
        }
        chosen = np.concatenate(list(kinds.values()))
        grids = np.tile(counts.argmax(axis=1)[layout.level], (len(chosen), 1))
        grids[:, layout.level == level] = chosen[:, None]
        images = dict(zip(chosen, run.decode(grids.reshape(-1, *layout.shape)), strict=True))
        each = most_bytes // (3 * _CODES_SHOWN * len(counts))
        share = of_level / of_level.sum()
        levels.append(
            [
                (
                    title,
                    [
                        _picture(picture(images[c]), f"Code {c}: {share[c]:.3%} of all codes", each)
                        for c in codes
                    ],
                )
                for title, codes in kinds.items()
                if len(codes)
            ]
        )
    return levels


def _stored_picture(path: epath.Path, alt: str, most_bytes: int) -> Picture:
    """Returns the picture in a file; see `_picture`."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return _picture(image, alt, most_bytes)
    except OSError as error:
        raise VqbeamError(f"{path} cannot be read ({first_line(error)}); delete it") from error


def _picture(image: Image.Image, alt: str, most_bytes: int) -> Picture:
    """Returns a picture of at most `most_bytes`: a PNG, or else a JPEG, halved until it fits."""
    image = image.convert("RGB")
    width, height = image.size
    image.thumbnail((_LARGEST_SIDE, 4 * _LARGEST_SIDE))
    kind, data = "png", _encoded(image, "PNG", optimize=True)
    while len(data) > most_bytes:
        kind, data = "jpeg", _encoded(image, "JPEG", quality=85)
        if min(image.size) < 2:
            break
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return Picture(
        f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt, width, height
    )


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _curves(facts: Facts, all_facts: list[Facts]) -> list[Chart]:
    """Returns charts of the losses of both stages by epoch, and of finetuning if there was any."""
    vqvae, prior = facts.config.vqvae, facts.config.prior
    both = {"training": "loss", "held out": "val_loss"}
    charts = []
    for title, stage, settings in (
        ("Stage 1: loss", "train-vqvae", vqvae),
        ("Stage 2: nats per code", "train-prior", prior),
    ):
        together = [epoch for each in all_facts for epoch in each.histories[stage]]
        steps = settings.steps_per_epoch, settings.steps
        charts += line_chart(title, both, facts.histories[stage], together, steps)
    finetuned = facts.manifests.get("train-vqvae", {}).get("finetune_history", [])
    if len(finetuned) > 1:
        terms = {"reconstruction": "reconstruction", "perceptual": "perceptual"}
        title = "Stage 1: finetuning of the decoder"
        steps = vqvae.steps_per_epoch, vqvae.finetune_steps
        charts += line_chart(title, terms, finetuned, finetuned, steps)
    return charts


def _usage_curve(facts: Facts, all_facts: list[Facts]) -> list[Chart]:
    stage, settings = "train-vqvae", facts.config.vqvae
    return line_chart(
        f"Perplexity while stage 1 trained, of {settings.num_codes:,} codes",
        {"training": "perplexity", "held out": "val_perplexity"},
        facts.histories[stage],
        [epoch for each in all_facts for epoch in each.histories[stage]],
        (settings.steps_per_epoch, settings.steps),
    )


def _count_charts(counts: np.ndarray) -> list[Chart]:
    """Returns, for each level, a chart of the shares of its codes, most used first."""
    return [
        bar_chart(f"Codes by use{f', level {level}' if len(counts) > 1 else ''}", of_level)
        for level, of_level in enumerate(counts)
    ]


def _stage_1(facts: Facts) -> dict[str, Any] | None:
    """Returns the table of stage 1's metrics, or None."""
    if not facts.vqvae:
        return None
    rows = []
    for name, value in vqvae_rows(facts.vqvae):
        definition, real = _STAGE_1[name.partition(" (")[0]]
        rows.append((name, definition, [value.partition(", of")[0], real]))
    return {
        "title": f"Stage 1, on {facts.vqvae['images']:,} held-out images",
        "head": ["reconstructions", "real images"],
        "rows": rows,
    }


def _stage_2(facts: Facts) -> dict[str, Any] | None:
    """Returns the table of stage 2's metrics, or None."""
    if not facts.prior:
        return None
    sets = [facts.prior[name] for name in ("samples", "reconstructions", "real")]
    rows = [
        (title, _STAGE_2[name], [form.format(each[name]) for each in sets])
        for name, (title, form) in FIGURES.items()
        if all(each.get(name) is not None for each in sets)
    ]
    return {
        "title": f"Stage 2, sets of {facts.prior['images']:,} images against as many held out",
        "head": ["samples", "reconstructions", "real images"],
        "rows": rows,
    }


def _nearest(run: RunFolder, most_bytes: int) -> Picture | None:
    """Returns the samples nearest to a training image, each above it; None if there are none."""
    path = run.evaluation / "nearest.png"
    if not path.exists():
        return None
    alt = "The ten samples nearest to a training image, each above that image"
    return or_reason(lambda: _stored_picture(path, alt, most_bytes))[0]


def _stages(run: RunFolder, facts: Facts) -> list[list[str]]:
    """Returns the table of times, speeds and memory, whose first row is the head."""
    rows = [["stage", "time", "images/s", "device memory", "parameters"]]
    for stage in STAGES:
        manifest = facts.manifests.get(stage)
        if manifest is None:
            steps = run.trained_steps(stage) if stage in facts.histories else 0
            rows.append([stage, f"{steps:,} steps done" if steps else "not done", "", "", ""])
            continue
        speed = manifest.get("speed", {})
        rate, memory = speed.get("images_per_second"), speed.get("device_bytes")
        rows.append(
            [
                stage,
                duration(manifest["seconds"]),
                f"{rate:,.0f}" if rate else "",
                f"{memory / 2**30:.1f} GiB" if memory else "",
                f"{manifest['parameters']:,}" if "parameters" in manifest else "",
            ]
        )
    # Empty columns are left out: on a CPU, for example, the device memory is unknown.
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def _settings_table(config: Config) -> list[tuple[str, str, str | None]]:
    """Returns name and value of every setting, and the preset's value if it differs."""
    preset = preset_settings(config) or {}
    return [
        (name, value, preset[name] if preset.get(name, value) != value else None)
        for name, value in typed_settings(config).items()
    ]


def _provenance(run: RunFolder, facts: Facts) -> list[tuple[str, str, str]]:
    """Returns each finished stage with the time when it ended and the hash of its result."""
    rows = []
    for stage, manifest in facts.manifests.items():
        ended = datetime.datetime.fromtimestamp(modified(run.folder(stage) / MANIFEST))
        rows.append((stage, f"{ended:%Y-%m-%d %H:%M}", manifest["sha256"]))
    return rows


def _commands(facts: Facts) -> list[tuple[str, str]]:
    """Returns the next commands to use, each after a description."""
    root, settings = facts.root, typed_settings(facts.config)
    preset = preset_settings(facts.config)
    changed = [
        word
        for name, value in settings.items()
        if preset and preset[name] != value
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    name = facts.config.name if preset else "PRESET.py"
    return [
        ("Sample new images", shlex.join(["vqbeam", "sample", root, "--output", "new.png"])),
        ("Measure the run", shlex.join(["vqbeam", "evaluate", root])),
        (
            "Resume, or make what is missing",
            shlex.join(["vqbeam", "run", name, "--run-dir", root, *changed]),
        ),
    ]
