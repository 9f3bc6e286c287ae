"""The folder of a run: the outputs of each stage, and whether a stage is done.

    DIR/config.json   the run's config
    DIR/sample.json   sampling settings chosen after training, if any
    DIR/.lock.json    (no stage)    the running command
    DIR/.retrained.json             stages whose models are being trained again
    DIR/images/       prepare       TFDS dataset of uint8 images
    DIR/vqvae/        train-vqvae   model, checkpoints, logs
    DIR/codes/        encode        TFDS dataset of code grids
    DIR/prior/        train-prior   model, checkpoints, logs
    DIR/samples/      sample        new images
    DIR/evaluation/   (no stage)    metrics and classifier of vqbeam evaluate

Each stage writes its manifest last, with the hashes of its inputs, the sizes of its outputs, and
its metrics. A stage is done if it has a manifest that matches its current inputs; other files in
its folder do not matter.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any

from etils import epath

from vqbeam.configs import Config, VqbeamError, differences, from_dict, to_dict
from vqbeam.vqvae.storage.files import matching, read_json, sizes, write_json

# The folder and the input stages of each stage, in the order in which the stages run.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "prepare": ("images", ()),
    "train-vqvae": ("vqvae", ("prepare",)),
    "encode": ("codes", ("prepare", "train-vqvae")),
    "train-prior": ("prior", ("encode",)),
    "sample": ("samples", ("train-vqvae", "train-prior")),
}
# The config section used by each stage.
_SECTIONS = {
    "prepare": "data",
    "train-vqvae": "vqvae",
    "encode": "encode",
    "train-prior": "prior",
    "sample": "sample",
}
# The stages that make a model, and those that write a dataset shard by shard.
MODELS = ("train-vqvae", "train-prior")
SHARDED = ("prepare", "encode")
MANIFEST = "manifest.json"
# Number of digits of a result's hash in records, configs and messages.
HASH_DIGITS = 16
_CONFIG = "config.json"


class RunFolder:
    """The folder of one run.

    Args:
        path: A local path or any other path that etils.epath supports, such as gs://BUCKET/NAME.
        remember: Whether to read each manifest only once; for readers of finished stages.
    """

    def __init__(self, path: epath.PathLike, remember: bool = False):
        self.root = epath.Path(path).expanduser()
        self._remembered: dict[str, dict[str, Any]] | None = {} if remember else None

    def folder(self, stage: str) -> epath.Path:
        """Returns the output folder of a stage."""
        return self.root / STAGES[stage][0]

    def trained_steps(self, stage: str) -> int:
        """Returns the number of steps of a stage's training, according to its last checkpoint."""
        settings = self._settings(stage)
        steps = min(settings.get("steps", 1), settings.get("steps_per_epoch", 1))
        kept = matching(self.folder(stage) / "checkpoints", "*")
        return max((step for folder in kept for step in checkpoint_files(folder, steps)), default=0)

    def has_begun(self, stage: str) -> bool:
        """Returns whether a stage has a checkpoint to resume from, of its settings and inputs."""
        folders = [self.folder(stage) / "checkpoints" / name for name in self.fingerprints(stage)]
        return any(matching(folder, "*.weights.h5") for folder in folders)

    def parent(self, stage: str) -> tuple[str, str] | None:
        """Returns the run whose model a training starts from, and the hash of that model.

        Returns:
            The run's folder and the first digits of its `result_hash`; None if training starts from
            random weights.
        """
        init_from = self._settings(stage)["init_from"]
        if init_from is None:
            return None
        path, _, model = init_from.rpartition("@")
        return path, model

    def _settings(self, stage: str) -> dict[str, Any]:
        return to_dict(self.load_config())[_SECTIONS[stage]]

    @property
    def evaluation(self) -> epath.Path:
        """The folder with the results of `vqbeam evaluate`."""
        return self.root / "evaluation"

    def measures(self, name: str) -> dict[str, Any] | None:
        """Returns `evaluation/NAME.json`; None if there is none, or it is of models replaced since.

        Args:
            name: "vqvae" or "prior".
        """
        path, models = self.evaluation / f"{name}.json", self.measured_models(name)
        found = read_json(path) if path.exists() else {}
        # Earlier versions did not say which models they had measured.
        return found if found and found.get("models", models) == models else None

    def measured_models(self, name: str) -> dict[str, str | None]:
        """Returns the hashes of the models that `evaluation/NAME.json` is about."""
        models = MODELS if name == "prior" else ("train-vqvae",)
        return {stage: self.result_hash(stage) for stage in models}

    def exists(self) -> bool:
        """Returns whether a run has been started in the folder."""
        return (self.root / _CONFIG).exists()

    def check_free(self) -> None:
        """Checks that the folders of a new run's stages are empty.

        Files in them would be mixed with those of the run, or be results of unknown settings.

        Raises:
            VqbeamError: There are files in the folder of a stage.
        """
        for stage in STAGES:
            if matching(self.folder(stage), "*"):
                raise VqbeamError(
                    f"{self.folder(stage)} has files in it, and {self.root} has no {_CONFIG}: it "
                    "is not the folder of a run; choose another --run-dir, or put the file back"
                )

    def start(self, config: Config, extend: bool = False) -> None:
        """Creates the folder and stores the config.

        A setting can be changed until its stage has a result or a checkpoint. `log` can be changed
        at any time, and so can `steps_per_epoch` unless the result depends on it.

        Args:
            config: The config.
            extend: Whether to accept more training steps than before, even for a finished model.
                Its training then continues from the last checkpoint.

        Raises:
            VqbeamError: The folder has a run with a different config, and a stage that depends on
                a changed setting has a result or a checkpoint; or a model cannot be extended.
        """
        if self.exists():
            changed = differences(self.load_config(), config)
            longer = self._longer(config) if extend else {}
            if len(longer) > 1 and self.trained_steps("train-prior"):
                raise VqbeamError(
                    "both vqvae.steps and prior.steps are higher, but after more steps the VQ-VAE "
                    "makes other codes, for which the prior would be trained anew; extend the "
                    "VQ-VAE alone, then add --retrain train-prior"
                )
            if any(self._is_bound(change) for change in changed if _name(change) not in longer):
                raise VqbeamError(
                    f"{self.root} contains a run with a different config ({'; '.join(changed)}); "
                    "choose another --run-dir, or repeat the settings of that run"
                )
            for stage in longer.values():
                self._take_along(stage, config)
            if changed:
                write_json(self.root / _CONFIG, to_dict(config))
            if extend:
                self._reopen()
            return
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / _CONFIG, to_dict(config))

    def _longer(self, config: Config) -> dict[str, str]:
        """Returns the stages with more steps in a new config, by the name of the setting."""
        longer = {}
        for stage in MODELS:
            before, after = self._settings(stage), to_dict(config)[_SECTIONS[stage]]
            if after["steps"] > before["steps"]:
                self._check_longer(stage, before, after)
                longer[f"{_SECTIONS[stage]}.steps"] = stage
        return longer

    def _check_longer(self, stage: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        section, finished = _SECTIONS[stage], (self.folder(stage) / MANIFEST).exists()
        if before.get("early_stopping"):
            raise VqbeamError(
                f"{section}.early_stopping is {before['early_stopping']}, and --extend is for a "
                f"fixed number of steps; give another --run-dir, and --init-from {self.root}"
            )
        if finished and not self.trained_steps(stage):
            raise VqbeamError(
                f"{self.folder(stage)} has no checkpoint to go on from; give another --run-dir, "
                f"and --init-from {self.root}"
            )
        epochs = [min(values["steps"], values["steps_per_epoch"]) for values in (before, after)]
        steps = before["steps"]
        # Otherwise the shorter epoch at the end would count as a full one.
        if self.trained_steps(stage) == steps and steps % epochs[1]:
            epoch = steps if steps % epochs[0] else epochs[0]
            raise VqbeamError(
                f"{section}.steps was {steps}, which is no multiple of an epoch of {epochs[1]} "
                f"steps; add --{section}.steps-per-epoch {epoch}"
            )

    def _take_along(self, stage: str, config: Config) -> None:
        """Moves the checkpoints of a stage to the folder where a new config looks for them."""
        checkpoints = self.folder(stage) / "checkpoints"
        target = checkpoints / self.fingerprints(stage, config)[0]
        for fingerprint in self.fingerprints(stage):
            for file in matching(checkpoints / fingerprint, "*"):
                target.mkdir(parents=True, exist_ok=True)
                file.replace(target / file.name)

    def _reopen(self) -> None:
        """Removes the manifests of models that have been trained for fewer steps than wanted."""
        for stage in MODELS:
            steps, settings = self.trained_steps(stage), self._settings(stage)
            if not settings.get("early_stopping") and 0 < steps < settings["steps"]:
                (self.folder(stage) / MANIFEST).unlink(missing_ok=True)

    def _is_bound(self, change: str) -> bool:
        """Returns whether it is too late for a change such as `vqvae.num_codes: 256 → 512`."""
        section, dot, field = _name(change).partition(".")
        return _name(change) != "log" and any(
            self._binds(stage, field) for stage in STAGES if not dot or _SECTIONS[stage] == section
        )

    def _binds(self, stage: str, field: str) -> bool:
        done = (self.folder(stage) / MANIFEST).exists()
        if field == "steps_per_epoch" and not self._settings(stage).get("early_stopping"):
            # Checkpoints of earlier versions are numbered by epochs.
            kept = matching(self.folder(stage) / "checkpoints", "*")
            return not done and any(matching(folder, "epoch-*") for folder in kept)
        return done or bool(self.trained_steps(stage))

    def load_config(self) -> Config:
        """Returns the run's config.

        Raises:
            VqbeamError: The folder has no run, or its config cannot be read by this version.
        """
        path = self.root / _CONFIG
        if not path.exists():
            raise VqbeamError(
                f"{self.root} is not a run folder: it has no {_CONFIG}; check the path"
            )
        values = read_json(path)
        try:
            return from_dict(values)
        except VqbeamError as error:
            raise VqbeamError(f"{path}: {error}") from None

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Returns a stage's manifest, or None if the stage has not finished.

        Raises:
            VqbeamError: The manifest was modified or damaged.
        """
        if self._remembered and stage in self._remembered:
            return self._remembered[stage]
        path = self.folder(stage) / MANIFEST
        if not path.exists():
            return None
        manifest = read_json(path)
        if manifest.get("sha256") != _hash_of(manifest) or not _is_right(manifest):
            raise VqbeamError(
                f"{path} is not as vqbeam writes it: it was changed by hand, is damaged, or is of "
                f"an earlier version; restore it, or delete it and {self._again(stage)}"
            )
        manifest = _Manifest(path, manifest)
        if self._remembered is not None:
            self._remembered[stage] = manifest
        return manifest

    def is_done(self, stage: str) -> bool:
        """Returns whether a stage has finished with the current inputs.

        A dataset with missing or damaged files is not done: its stage writes these again, and no
        others.

        Raises:
            VqbeamError: The stage has finished, but all its files are missing, or its model is
                damaged.
        """
        return stage in self.done([stage])

    def done(self, stages: Iterable[str]) -> set[str]:
        """Returns the stages that are done (see `is_done`); each stage is checked only once."""
        found: dict[str, bool] = {}

        def look(stage):
            if stage not in found:
                manifest = self.manifest(stage)
                fits = manifest is not None and manifest["inputs"] == self._input_hashes(stage)
                if fits and (damage := self._damage(stage, manifest)):
                    if stage not in SHARDED or self.is_elsewhere(stage):
                        raise self._error_of(stage, damage)
                    fits = False
                found[stage] = fits and all(map(look, STAGES[stage][1]))
            return found[stage]

        return {stage for stage in stages if look(stage)}

    def require(self, stage: str, among: Iterable[str] = tuple(STAGES)) -> dict[str, Any]:
        """Returns the manifest of a stage that must be done.

        Args:
            stage: The stage.
            among: Stages whose results are used together with this one, which must have been made
                from their current results. A missing result is no error, since a model can be used
                without its data.

        Raises:
            VqbeamError: The stage is not done, its files are damaged, or a result that it was made
                from has changed since.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            raise VqbeamError(
                f"{self.root} has no finished {stage} stage; run vqbeam {stage} PRESET "
                f"--run-dir {self.root} first"
            )
        if damage := self._damage(stage, manifest):
            raise self._error_of(stage, damage)
        if self.is_stale(stage, among):
            raise VqbeamError(
                f"the {stage} stage of {self.root} was made from inputs that have changed since; "
                f"run vqbeam run PRESET --run-dir {self.root} first"
            )
        return manifest

    def is_stale(self, stage: str, among: Iterable[str] = tuple(STAGES)) -> bool:
        """Returns whether a result that a stage was made from has been replaced since."""
        return any(
            self.result_hash(source) not in (None, hash)
            for source, hash in self._made_from(stage).items()
            if source in among
        )

    def check_replaceable(self, stage: str) -> None:
        """Raises a VqbeamError if a stage would replace a finished model because inputs changed."""
        if stage in MODELS and self.manifest(stage) is not None and self.is_stale(stage):
            raise VqbeamError(
                f"{self.folder(stage)} holds a finished model, and its inputs have changed since; "
                f"add --retrain {stage} to replace it, or give another --run-dir to keep it"
            )

    def fingerprint(self, stage: str) -> str:
        """Returns a hash of a stage's settings and inputs, to detect stale partial work."""
        return self.fingerprints(stage)[0]

    def fingerprints(self, stage: str, config: Config | None = None) -> tuple[str, str]:
        """Returns the hash of `fingerprint`, and the one that earlier versions computed.

        Args:
            stage: The stage.
            config: The config to use instead of the run's.
        """
        config = config or self.load_config()
        settings = to_dict(config)[_SECTIONS[stage]]
        # This decides whether a result is accepted, but does not affect it.
        settings.pop("max_failed", None)
        if settings.get("init_from") is None:  # earlier versions did not have this setting
            settings.pop("init_from", None)
        earlier = self._hash_with(stage, config.seed, settings)
        if not settings.get("early_stopping"):  # early stopping counts epochs
            settings.pop("steps_per_epoch", None)
        return self._hash_with(stage, config.seed, settings), earlier

    def _hash_with(self, stage: str, seed: int, settings: dict[str, Any]) -> str:
        own = [seed, settings]
        inputs = json.dumps([stage, own, self._input_hashes(stage)])
        return hashlib.sha256(inputs.encode()).hexdigest()[:16]

    def begin(self, stage: str) -> None:
        """Creates a stage's folder, removes its manifest and stores the start time."""
        self.folder(stage).mkdir(parents=True, exist_ok=True)
        (self.folder(stage) / MANIFEST).unlink(missing_ok=True)
        write_json(self._begun_file(stage), time.time())

    def finish(self, stage: str, outputs: list[epath.Path], **facts: Any) -> dict[str, Any]:
        """Writes a stage's manifest, which marks the stage as done, and returns it.

        Args:
            stage: Name of the stage.
            outputs: The output files, which must be in the stage's folder.
            **facts: Other manifest entries, such as counts and metrics. `seconds` is added: the
                time since `begin`, that is, since the last start of an interrupted stage.
        """
        folder = self.folder(stage)
        begun = self._begun_file(stage)
        # A concurrent attempt may already have finished the stage.
        start = read_json(begun, float) if begun.exists() else time.time()
        inputs = self._input_hashes(stage)
        made_from = {}
        for source in inputs:
            made_from |= self._made_from(source)
        made_from |= inputs
        manifest = {
            "stage": stage,
            "inputs": inputs,
            "made_from": made_from,
            "outputs": {
                str(path.relative_to(folder)): found
                for path, found in zip(outputs, sizes(outputs), strict=True)
            },
            # The clock may have been set back.
            "seconds": max(0.0, round(time.time() - start, 1)),
            **facts,
        }
        manifest["sha256"] = _hash_of(manifest)
        write_json(folder / MANIFEST, manifest)
        begun.unlink(missing_ok=True)
        return manifest

    def _begun_file(self, stage: str) -> epath.Path:
        return self.root / f".begun-{stage}.json"

    def _input_hashes(self, stage: str) -> dict[str, str | None]:
        return {source: self.result_hash(source) for source in STAGES[stage][1]}

    def result_hash(self, stage: str) -> str | None:
        """Returns the hash of a stage's result, or None if the stage has not finished."""
        manifest = self.manifest(stage)
        return manifest and manifest["sha256"]

    def _made_from(self, stage: str) -> dict[str, str]:
        """Returns the hashes, by stage, of all earlier results that a stage's result depends on."""
        manifest = self.manifest(stage)
        if manifest is None:
            return {}
        if "made_from" in manifest:
            return manifest["made_from"]
        # Earlier versions stored only the direct inputs.
        made_from = dict(manifest["inputs"])
        for source in manifest["inputs"]:
            made_from = self._made_from(source) | made_from
        return made_from

    def _outputs(self, stage: str, manifest: dict[str, Any]) -> dict[epath.Path, int]:
        """Returns the size of each output file, according to the manifest."""
        outputs = {self.folder(stage) / name: size for name, size in manifest["outputs"].items()}
        if stage in MODELS:  # earlier versions listed a picture as well
            outputs = {path: size for path, size in outputs.items() if path.suffix != ".png"}
        return outputs

    def is_elsewhere(self, stage: str) -> bool:
        """Returns whether a finished stage has a manifest here, but none of its files."""
        manifest = self.manifest(stage)
        outputs = list(self._outputs(stage, manifest)) if manifest else []
        return bool(outputs) and set(sizes(outputs)) == {None}

    def _error_of(self, stage: str, damage: str) -> VqbeamError:
        delete = "" if stage in SHARDED else f"delete {self.folder(stage) / MANIFEST} and "
        result = ", which writes only what is missing" if stage in SHARDED else ""
        if stage in MODELS and self.trained_steps(stage):
            result = ", which restores it from its last checkpoint"
        return VqbeamError(f"{damage}; {delete}{self._again(stage)}{result}")

    def _damage(self, stage: str, manifest: dict[str, Any]) -> str:
        """Returns which output is missing or has another size; "" if there is none."""
        outputs = self._outputs(stage, manifest)
        for (path, whole), found in zip(outputs.items(), sizes(list(outputs)), strict=True):
            if found != whole:
                state = "is missing" if found is None else f"has {found} bytes instead of {whole}"
                return f"{path} {state}"
        return ""

    def _again(self, stage: str) -> str:
        verb = "run" if stage == "sample" else stage  # `vqbeam sample` does not write the stage
        return f"run vqbeam {verb} PRESET --run-dir {self.root} again"


def _name(change: str) -> str:
    """Returns the name of the setting in a line of `differences`."""
    return change.partition(":")[0]


def checkpoint_files(folder: epath.Path, steps_per_epoch: int) -> dict[int, epath.Path]:
    """Returns the checkpoints in a folder by their number of steps, in ascending order.

    Args:
        folder: The folder.
        steps_per_epoch: Steps of an epoch. Earlier versions named checkpoints by epoch, not step.
    """
    found = {}
    for path in matching(folder, "*.weights.h5"):
        unit, _, number = path.name.partition(".")[0].rpartition("-")
        # Other programs may have put other files there.
        if unit in ("step", "epoch") and number.isdecimal() and not path.is_dir():
            found[int(number) * (steps_per_epoch if unit == "epoch" else 1)] = path
    return dict(sorted(found.items()))


class _Manifest(dict):
    """A manifest whose path is named in the error for an entry that another program left out."""

    def __init__(self, path: epath.Path, entries: dict[str, Any]):
        super().__init__(entries)
        self._path = path

    def __missing__(self, name):
        raise VqbeamError(f"{self._path} has no entry {name!r}; restore it as vqbeam wrote it")


# The type of each entry of a manifest: those that all manifests have, and those that some have.
_ENTRIES = {"inputs": dict, "outputs": dict, "seconds": (int, float)}
_FURTHER = {"made_from": dict, "counts": dict, "label_names": list, "label_kind": str}
_FURTHER |= {"history": list, "measures": dict, "settings": dict, "failed": int, "noted": int}
_FURTHER |= {"left_out": dict}


def _is_right(manifest: dict[str, Any]) -> bool:
    return all(isinstance(manifest.get(name), kind) for name, kind in _ENTRIES.items()) and all(
        isinstance(manifest[name], kind) for name, kind in _FURTHER.items() if name in manifest
    )


def _hash_of(manifest: dict[str, Any]) -> str:
    """Returns a hash of a manifest, without the entries that vary between identical results."""
    varies = "sha256", "seconds", "speed", "left_out"
    said = {name: value for name, value in manifest.items() if name not in varies}
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
