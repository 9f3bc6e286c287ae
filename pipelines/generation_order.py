"""What `generate` is to draw, and the folder that is bound to it."""

import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.vqvae.storage.files import matching, read_json, write_json

_FILE = "generate.json"


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be drawn, and into which folder.

    Attributes:
        run: The run's folder.
        output: The folder of the images.
        form: "png" or "tfrecord".
        labels: As `label_rows` takes them.
        seed: Of the random numbers; image i of a seed is always the same image.
        shard_images: Images of one shard: whole batches.
        settings: How they are drawn; its `num` is the number of all images.
        preset: That of the run.
        checkpoint: That of the run's models.
    """

    run: str
    output: str
    form: str
    labels: tuple[str, ...] | None
    seed: int
    shard_images: int
    settings: SampleConfig
    preset: str
    checkpoint: str

    @property
    def folder(self) -> epath.Path:
        """The folder of the images."""
        return epath.Path(self.output)

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides what is drawn and how it lies on disk, as JSON has it."""
        values = dataclasses.asdict(self)
        facts = values.pop("settings") | values
        del facts["run"], facts["output"]
        return json.loads(json.dumps(facts))

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.settings.num // self.shard_images)

    @property
    def fingerprint(self) -> str:
        """A hash of the facts."""
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:16]

    def claim_folder(self) -> None:
        """Binds the folder to the order: from now on it takes no images of another.

        Raises:
            VqbeamError: It holds something else.
        """
        if self._file.exists():
            found, facts = read_json(self._file)["order"], self.facts
            changed = [
                f"{name} {found.get(name)}" for name in facts if found.get(name) != facts[name]
            ]
            if changed:
                raise VqbeamError(
                    f"{self.folder} holds images of {', '.join(changed)}; ask for the same, or "
                    "give another --output"
                )
        elif self.folder.exists() and matching(self.folder, "[!.]*"):
            raise VqbeamError(f"{self.folder} is not empty; give another --output")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"order": self.facts, "done": False})

    def is_done(self) -> bool:
        """Tells whether all images of the order are in its folder, which it has claimed."""
        return read_json(self._file)["done"]

    def finish(self) -> None:
        """Declares that they are."""
        write_json(self._file, {"order": self.facts, "done": True})

    @property
    def _file(self) -> epath.Path:
        return self.folder / _FILE
