"""New images from a trained run: as asked for, or once more those of a file."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import SampleConfig
from vqbeam.pipelines.sampling.decoder import (
    Models,
    Samples,
    changed_defaults,
    check_guidance,
    draw_samples,
    fitted,
    learned_labels,
)
from vqbeam.pipelines.sampling.files import write_samples
from vqbeam.pipelines.sampling.labels import label_rows
from vqbeam.pipelines.sampling.provenance import check_checkpoint, read_provenance
from vqbeam.vqvae.storage.run_folder import RunFolder

STAGE = "sample"


def sample(
    run_dir: str,
    *,
    labels: Sequence[str] | None = None,
    seed: int | None = None,
    like: str | None = None,
    output: str | None = None,
    **settings: Any,
) -> None:
    """Draws new images from a run and writes them; what is None is as the run says.

    Args:
        run_dir: The run's folder.
        labels: Names or numbers of the classes to draw, in turn; or of attributes, those of an
            image joined by commas. By default all classes, or each attribute alone.
        seed: Of the random numbers; image i of a seed is always the same image.
        like: A .png or .npz that this verb has written: draws its images again, but for what the
            other arguments say.
        output: A .png (one labelled grid; a single picture where `like` is one), a .npz (images,
            codes, labels), or a folder (a PNG for each image and samples.jsonl). samples.png by
            default.
        **settings: Fields of SampleConfig.

    Raises:
        VqbeamError: The run has no trained prior, a setting is out of range, or `like` was drawn
            by another checkpoint or does not say what it was drawn with.
    """
    run = RunFolder(run_dir)
    config = run.load_config()
    output = output or "samples.png"
    path = epath.Path(output).expanduser()
    changes = {name: value for name, value in settings.items() if value is not None}
    bare = False
    if like is None:
        samples = draw(run, changes, labels, config.seed if seed is None else seed)
    else:
        source = epath.Path(like).expanduser()
        facts = read_provenance(source)
        check_checkpoint(facts, run, source)
        samples = _draw_again(run, facts, changes, labels, seed)
        bare = "index" in facts and len(samples.images) == 1
    write_samples(samples, path, bare=bare)
    print(f"{len(samples.images)} new images: {path}")


def sample_stage(run_path: str) -> None:
    """Draws the images of `vqbeam run`, as the run's config says, into `DIR/samples`."""
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return
    run.begin(STAGE)
    samples = draw(run, {}, None, run.load_config().seed)
    path = run.folder(STAGE) / "samples.png"
    write_samples(samples, path)
    run.finish(STAGE, [path], settings=samples.settings)


def draw(
    run: RunFolder,
    changes: Mapping[str, Any],
    labels: Sequence[Any] | None,
    seed: int,
    models: Models | None = None,
) -> Samples:
    """Draws new images; see `sample`, and for `models` see `Drawer`."""
    settings = changed_defaults(run, changes)
    rows = label_rows(labels, learned_labels(run), settings.num)
    return draw_samples(run, fitted(settings, settings.num), seed, rows, models=models)


def _draw_again(
    run: RunFolder,
    facts: Mapping[str, Any],
    changes: Mapping[str, Any],
    labels: Sequence[str] | None,
    seed: int | None,
) -> Samples:
    """Draws the images that `facts` speak of, changed in what is given."""
    fields = [field.name for field in dataclasses.fields(SampleConfig)]
    stored = {name: facts[name] for name in fields if name in facts}
    drawn = facts.get("images", [facts])
    num = changes.get("num", len(drawn))
    rows = np.asarray([image.get("label", -1) for image in drawn], np.int32)
    if labels is not None:
        rows = label_rows(labels, learned_labels(run), num)
    elif num != len(drawn):
        # As many as there were would cut off a turn through the classes.
        _, turn = np.unique(rows, axis=0, return_index=True)
        rows = rows[np.sort(turn)][np.arange(num) % len(turn)]
    settings = SampleConfig(**stored | changes)
    check_guidance(run, settings)
    seed = facts["seed"] if seed is None else seed
    return draw_samples(run, settings, seed, rows, drawn[0]["index"])
