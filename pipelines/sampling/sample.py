"""The command that samples new images, or samples those of a file again."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import SampleConfig
from vqbeam.pipelines.sampling.api import Run, Samples
from vqbeam.pipelines.sampling.files import check_checkpoint, read_provenance, write_samples
from vqbeam.vqvae.storage.labels import labels_for
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
    """Samples new images from a run and writes them.

    Args:
        run_dir: The run's folder.
        labels: Labels to use in turn: names or numbers of classes; or of attributes, those of an
            image joined by commas. By default all classes, or each attribute alone.
        seed: Seed of the random numbers; image i of a seed is always the same image. By default
            the run's own.
        like: A .png or .npz that this command has written: samples its images again, with the
            other arguments changed.
        output: A .png (one labelled grid; a single picture where `like` is one), a .npz (images,
            codes, labels), or a folder (a PNG for each image and samples.jsonl). By default
            samples.png.
        **settings: Fields of SampleConfig; by default the run's own.

    Raises:
        VqbeamError: The run has no trained prior, a setting is out of range, or `like` is of
            another checkpoint or no file of this command.
    """
    run = Run(run_dir)
    path = epath.Path(output or "samples.png").expanduser()
    bare = False
    if like is None:
        num = settings.pop("num", None) or run.default_settings().num
        samples = run.sample(num, labels, seed, **settings)
    else:
        source = epath.Path(like).expanduser()
        facts = read_provenance(source)
        check_checkpoint(facts, run, source)
        samples = _sample_again(run, facts, settings, labels, seed)
        bare = "index" in facts and len(samples.images) == 1
    write_samples(samples, path, bare=bare)
    print(f"{len(samples.images)} new images: {path}")


def sample_stage(run_path: str) -> None:
    """Writes the images of `vqbeam run`, by the run's own settings, to `DIR/samples`."""
    folder = RunFolder(run_path)
    if folder.is_done(STAGE):
        return
    folder.begin(STAGE)
    samples = Run(run_path).sample()
    path = folder.folder(STAGE) / "samples.png"
    write_samples(samples, path)
    folder.finish(STAGE, [path], settings=samples.settings)


def _sample_again(
    run: Run,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    labels: Sequence[str] | None,
    seed: int | None,
) -> Samples:
    """Returns the images that the provenance `facts` describe, with the given changes."""
    changes = {name: value for name, value in settings.items() if value is not None}
    fields = [field.name for field in dataclasses.fields(SampleConfig)]
    stored = {name: facts[name] for name in fields if name in facts}
    listed = facts.get("images", [facts])
    num = changes.get("num", len(listed))
    rows = np.asarray([image.get("label", -1) for image in listed], np.int32)
    if labels is not None:
        rows = labels_for(labels, run.prior_labels, num)
    elif num != len(listed):
        # Repeats whole cycles of the labels, rather than the list, which may end within one.
        _, cycle = np.unique(rows, axis=0, return_index=True)
        rows = rows[np.sort(cycle)][np.arange(num) % len(cycle)]
    chosen = run.checked(SampleConfig(**stored | changes))
    seed = facts["seed"] if seed is None else seed
    return run.sample_rows(rows, seed, chosen, listed[0]["index"])
