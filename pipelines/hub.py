"""Runs on the Hugging Face hub: the files that sampling needs, and a model card."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys

from etils import epath

from vqbeam.configs import Config, VqbeamError, first_line, to_dict
from vqbeam.pipelines.paths import HUB
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage.files import read_json, write_folder
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder

_CHECKSUMS = "checksums.json"


def push(run_dir: str, target: str, private: bool = False) -> str:
    """Publishes the models of a run with a model card; returns a line that says where.

    On the hub, all files appear in one commit; a folder also appears with all its files.

    Args:
        run_dir: Folder of a run with a trained VQ-VAE; its prior is published if it is trained.
        target: `hf://USER/NAME`, which is created if needed, or a new local folder.
        private: Whether a repository that is created on the hub is private.

    Raises:
        VqbeamError: A model is damaged, the folder exists, or the hub refuses the upload.
    """
    run = RunFolder(run_dir)
    files = _published(run)
    files["README.md"] = _card(run, target, "samples.png" in files).encode()
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[_CHECKSUMS] = (json.dumps(checksums, indent=1) + "\n").encode()
    if target.startswith(HUB):
        return f"published: {_upload(files, target.removeprefix(HUB), private)}"
    _write_folder(files, epath.Path(target))
    return f"published: {target}"


def _published(run: RunFolder) -> dict[str, bytes]:
    """Returns the files of a run that are published, by their path in its folder."""
    config = _without_local_paths(run.load_config())
    files = {"config.json": (json.dumps(to_dict(config), indent=1) + "\n").encode()}
    needed = [stage for stage in MODELS if run.manifest(stage) or stage == "train-vqvae"]
    for stage in needed:
        run.require(stage, among=needed)
        for name in ("manifest.json", "model.keras"):
            path = run.folder(stage) / name
            files[str(path.relative_to(run.root))] = path.read_bytes()
    settings, picture = run.root / "sample.json", run.folder("sample") / "samples.png"
    if settings.exists():
        files["sample.json"] = settings.read_bytes()
    if picture.exists() and len(needed) == len(MODELS) and not run.is_stale("sample"):
        files["samples.png"] = picture.read_bytes()
    return files


def _without_local_paths(config: Config) -> Config:
    """Returns the config without folder names of this machine and names of private projects."""
    data = dataclasses.replace(config.data, data_dir=None, manual_dir=None)
    if data.path:
        source = data.source.removesuffix(data.path) + _last_part(data.path)
        data = dataclasses.replace(data, source=source)
    return dataclasses.replace(
        config,
        log=None,
        data=data,
        **{
            section: dataclasses.replace(of, init_from=of.init_from and _last_part(of.init_from))
            for section, of in {"vqvae": config.vqvae, "prior": config.prior}.items()
        },
    )


def _last_part(path: str) -> str:
    return os.path.basename(path.rstrip("/"))


def _upload(files: dict[str, bytes], name: str, private: bool) -> str:
    library = _library()
    added = [library.CommitOperationAdd(path, content) for path, content in files.items()]
    hub = library.HfApi()
    try:
        name = hub.create_repo(name, private=private or None, exist_ok=True).repo_id
        hub.create_commit(name, added, commit_message="A model trained with vqbeam")
    except Exception as error:  # of many types
        raise VqbeamError(
            f"{HUB}{name} cannot be written ({first_line(error)}); check the name, the "
            "connection, and that `hf auth login` was run"
        ) from error
    return f"{hub.endpoint}/{name}"


def _write_folder(files: dict[str, bytes], folder: epath.Path) -> None:
    if folder.exists():
        raise VqbeamError(f"{folder} is there already; choose another folder, or delete it")

    def write(place):
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)

    write_folder(folder, write)


def local_run(path: str) -> str:
    """Returns the local folder of a run, which is downloaded if `path` begins with `hf://`.

    Args:
        path: A path, which is returned unchanged, or `hf://USER/NAME`, optionally with `@REVISION`:
            a branch, a tag or a commit.

    Raises:
        VqbeamError: The run cannot be downloaded, was not published by `push`, or a file is
            damaged.
    """
    if not path.startswith(HUB):
        return path
    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        folder = _library().snapshot_download(
            name, revision=revision or None, allow_patterns=["*.json", "*.keras"]
        )
    except Exception as error:  # of many types
        reason = first_line(error.__cause__ or error)
        raise VqbeamError(
            f"{path} cannot be downloaded ({reason}); check the name and the connection"
        ) from error
    _check_files(path, pathlib.Path(folder))
    return folder


def _library():
    """Returns the hub's library, imported only now; it shows progress only in a terminal."""
    import huggingface_hub
    import huggingface_hub.utils

    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _check_files(path: str, folder: pathlib.Path) -> None:
    """Raises a VqbeamError unless the files in a folder are those that were published."""
    if not (folder / _CHECKSUMS).exists():
        raise VqbeamError(f"{path} is not a run that `vqbeam push` has published")
    for name, expected in read_json(epath.Path(folder / _CHECKSUMS)).items():
        file = folder / name
        if file.suffix not in (".json", ".keras"):
            continue
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            # The files of a snapshot are links: if only these are deleted, the damage stays.
            raise VqbeamError(
                f"{file} is damaged; delete {folder.parent.parent} and run the same command again"
            )


_CARD = """\
---
library_name: vqbeam
pipeline_tag: {task}
tags:
- vq-vae
- image-generation
---

# {title}

{picture}{summary}

| | |
|---|---|
{rows}

## Use

```python
import vqbeam

run = vqbeam.open("{target}")
{example}
```

`config.json` holds all settings.
"""


def _card(run: RunFolder, target: str, has_picture: bool) -> str:
    """Returns the model card in the hub's Markdown."""
    config, prior = run.load_config(), run.manifest("train-prior")
    height, width, channels = config.image_shape
    what = "A VQ-VAE and a transformer prior" if prior else "A VQ-VAE"
    example = "samples = run.sample(8, seed=1)" if prior else "codes = run.encode(images)"
    return _CARD.format(
        task="unconditional-image-generation" if prior else "image-to-image",
        title=target.rpartition("/")[2] or config.name,
        picture="![Samples](samples.png)\n\n" if has_picture else "",
        summary=f"{what} for {height}×{width} {'RGB' if channels == 3 else 'grayscale'} images.",
        rows="\n".join(f"| {name} | {value} |" for name, value in _facts(run, config, prior)),
        target=target,
        example=example,
    )


def _facts(run: RunFolder, config: Config, prior: dict | None) -> list[tuple[str, str]]:
    """Returns the rows of the card's table."""
    vqvae = run.manifest("train-vqvae")
    measured = vqvae["measures"]
    rows = [
        ("data", _without_local_paths(config).data.source),
        ("codes of an image", code_layout(config).describe()),
        ("quantizer", config.vqvae.quantizer),
        ("parameters of the VQ-VAE", f"{vqvae['parameters']:,}"),
        ("reconstruction of held-out images", f"PSNR {measured['psnr']:.2f} dB"),
        ("codes in use", f"{measured['codes_used']:.0%}"),
    ]
    if prior:
        labels = Labels.of(prior)
        rows += [
            (labels.kind, ", ".join(labels.names) or "none"),
            ("parameters of the prior", f"{prior['parameters']:,}"),
            ("held-out nats per code", f"{prior['measures']['nats_per_code']:.3f}"),
        ]
    if prior and (evaluated := run.measures("prior")) and not run.is_stale("train-prior"):
        samples = evaluated["samples"]
        names = {"frechet": "Fréchet distance", "precision": "precision", "recall": "recall"}
        rows += [
            (f"{text} of samples, by `vqbeam evaluate`", f"{samples[name]:.3f}")
            for name, text in names.items()
            if samples.get(name) is not None
        ]
    return rows
