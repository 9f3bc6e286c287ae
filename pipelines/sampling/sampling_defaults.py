"""How a run draws images unless told otherwise: as its config says, or as was stored since."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.vqvae.storage.files import read_json, write_json
from vqbeam.vqvae.storage.run_folder import RunFolder

_FILE = "sample.json"


def sampling_defaults(run: RunFolder) -> SampleConfig:
    """Returns the run's settings, without guidance where there are no classes to guide towards.

    Raises:
        VqbeamError: The run has no trained prior, or what is stored is not what vqbeam stores.
    """
    path = run.root / _FILE
    settings = _stored(path) if path.exists() else run.load_config().sample
    has_classes = bool(run.require("train-prior")["label_names"])
    return settings if has_classes else dataclasses.replace(settings, guidance=1.0)


def _stored(path: epath.Path) -> SampleConfig:
    try:
        return SampleConfig(**read_json(path))
    except TypeError as error:
        raise VqbeamError(
            f"{path} does not fit this version of vqbeam ({error}); delete it"
        ) from error


def changed_defaults(run: RunFolder, settings: Mapping[str, Any]) -> SampleConfig:
    """Returns the run's settings with those that are not None in place of its own.

    Raises:
        VqbeamError: As `sampling_defaults`; or the run cannot be guided, or not so.
    """
    changes = {name: value for name, value in settings.items() if value is not None}
    changed = dataclasses.replace(sampling_defaults(run), **changes)
    bounds = [name for name in ("guidance_start", "guidance_end") if name in changes]
    if bounds and changed.guidance_schedule != "interval":
        raise VqbeamError(
            f"{bounds[0]} is {changes[bounds[0]]}, but guidance_schedule "
            f"{changed.guidance_schedule} has no start and no end; set it to interval"
        )
    check_guidance(run, changed)
    return changed


def check_guidance(run: RunFolder, settings: SampleConfig) -> None:
    """Raises a VqbeamError where the settings guide away from what the run's prior never saw."""
    if settings.guidance != 1 and not run.load_config().prior.label_dropout:
        raise VqbeamError(
            f"guidance is {settings.guidance}, but {run.root} was trained with "
            "prior.label_dropout 0 and does not know images without a label; use 1"
        )


def store_sampling_defaults(run: RunFolder, settings: SampleConfig) -> epath.Path:
    """Has all later drawing from a run go by these settings; returns the file that says so."""
    path = run.root / _FILE
    write_json(path, dataclasses.asdict(settings))
    return path
