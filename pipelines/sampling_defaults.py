"""How a run draws images unless told otherwise: as its config says, or as was stored since."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from configs import SampleConfig
from vqvae.run_folder import RunFolder, write_json

_FILE = "sample.json"


def sampling_defaults(run: RunFolder) -> SampleConfig:
    """Returns the run's settings, without guidance where there are no classes to guide towards."""
    path = run.root / _FILE
    stored = SampleConfig(**json.loads(path.read_text())) if path.exists() else None
    settings = stored or run.load_config().sample
    has_classes = bool(run.require("train-prior")["label_names"])
    return settings if has_classes else dataclasses.replace(settings, guidance=1.0)


def changed_defaults(run: RunFolder, settings: Mapping[str, Any]) -> SampleConfig:
    """Returns the run's settings with those that are not None in place of its own."""
    changes = {name: value for name, value in settings.items() if value is not None}
    return dataclasses.replace(sampling_defaults(run), **changes)


def store_sampling_defaults(run: RunFolder, settings: SampleConfig) -> None:
    """Has all later drawing from a run go by these settings."""
    write_json(run.root / _FILE, dataclasses.asdict(settings))
