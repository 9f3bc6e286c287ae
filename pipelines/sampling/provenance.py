"""What an image was drawn with: written into its file, and read from there."""

import hashlib
import io
import json
import zipfile
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder
from vqbeam.vqvae.training import MODEL_FILE

# Of the text chunk in a PNG, and of the array in an .npz.
KEY = "vqbeam"


def checkpoint(run: RunFolder) -> str:
    """Returns a fingerprint of the models of a run: of their weights, not of when they were saved.

    Raises:
        VqbeamError: The run lacks one of them.
    """
    sums = []
    for stage in MODELS:
        run.require(stage, among=MODELS)
        with (run.folder(stage) / MODEL_FILE).open("rb") as file, zipfile.ZipFile(file) as archive:
            members = {member.filename: member.CRC for member in archive.infolist()}
        # This one holds the date.
        members.pop("metadata.json", None)
        sums.append(sorted(members.items()))
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def read_provenance(path: epath.Path) -> dict[str, Any]:
    """Returns what the images in a file were drawn with, as `sample` wrote it.

    Args:
        path: A .png or .npz file.

    Raises:
        VqbeamError: The file is not there, or does not say what its images were drawn with.
    """
    if not path.exists():
        raise VqbeamError(f"there is no file {path}; --like takes a .png or .npz of vqbeam sample")
    try:
        facts = json.loads(_text(path.read_bytes()))
    except Exception:  # Pillow and zipfile raise many kinds for a file that is none of theirs
        facts = {}
    if (
        not isinstance(facts, dict)
        or "checkpoint" not in facts
        or not facts.keys() & {"index", "images"}
    ):
        raise VqbeamError(
            f"{path} does not say what it was drawn with; give a .png or .npz of vqbeam sample, "
            "as it was written"
        )
    return facts


def check_checkpoint(facts: dict[str, Any], run: RunFolder, path: epath.Path) -> None:
    """Raises a VqbeamError where images were drawn by other models than those of a run."""
    name, found = run.load_config().name, checkpoint(run)
    if facts["checkpoint"] != found:
        raise VqbeamError(
            f"{path} was drawn by checkpoint {facts['checkpoint']} (preset {facts['preset']}), but "
            f"{run.root} holds checkpoint {found} (preset {name}), which would draw another "
            "picture; give the run that drew it"
        )


def _text(data: bytes) -> str:
    """Returns the text in a file; raises one of several errors where there is none."""
    if data.startswith(b"PK"):
        with np.load(io.BytesIO(data)) as arrays:
            return str(arrays[KEY])
    with Image.open(io.BytesIO(data)) as image:
        return image.text[KEY]
