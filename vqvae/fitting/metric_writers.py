"""Writers of training metrics: TensorBoard always, a CSV file and Weights & Biases on request.

Each writer takes rows: the metrics of an epoch by name, with `epoch` and `step`.
"""

import csv
import io
import sys
import tempfile
import uuid
from typing import Any, Protocol

from etils import epath

from vqbeam.configs import Config, VqbeamError, first_line, to_dict
from vqbeam.vqvae.storage.files import is_local, read_json, read_regular, write_bytes, write_json


class MetricWriter(Protocol):
    """Writes the metrics of a training, some of which may have been written before a restart."""

    def start(self, epochs: int) -> None:
        """Starts after `epochs` epochs; rows of later epochs are written again."""

    def write(self, row: dict[str, Any]) -> None:
        """Writes the metrics of an epoch."""

    def close(self) -> None:
        """Finishes after the last epoch or an error; `start` may never have been called."""


def metric_writers(
    config: Config | None, title: str, folder: epath.Path, kept: epath.Path
) -> list[MetricWriter]:
    """Returns the writers of a training.

    Args:
        config: The run's config, whose `log` names the writers besides TensorBoard.
        title: Name of the training.
        folder: Output folder of the training.
        kept: Folder of its checkpoints, which is removed if training has to start over.
    """
    writers: list[MetricWriter] = [TensorBoard(folder / "logs")]
    if config is None:
        return writers
    if "csv" in config.log_to:
        writers.append(CsvFile(folder / "metrics.csv"))
    if project := config.log_to.get("wandb"):
        local = folder / "logs" if is_local(folder) else epath.Path(tempfile.gettempdir())
        writers.append(WandbRun(project, title, config, local, kept / "wandb.json"))
    return writers


class TensorBoard:
    """Event files in the folders `train` and `validation`, as Keras's own callback writes them.

    Args:
        folder: The parent of these two folders.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self.files: dict[str, Any] = {}

    def start(self, epochs: int) -> None:
        """Does nothing: of several events for a step, TensorBoard shows the latest."""

    def write(self, row: dict[str, Any]) -> None:
        """Writes a scalar for each metric; its step is the epoch, counted from 0."""
        import tensorflow as tf

        metrics = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        for name, value in metrics.items():
            part = "validation" if name.startswith("val_") else "train"
            if part not in self.files:
                self.files[part] = tf.summary.create_file_writer(str(self.folder / part))
            with self.files[part].as_default():
                tag = f"epoch_{name.removeprefix('val_')}"
                tf.summary.scalar(tag, value, step=row["epoch"] - 1)
        for file in self.files.values():
            file.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()


class CsvFile:
    """A CSV file with a line for each epoch.

    The whole file is rewritten each time, since files in buckets cannot be appended to.

    Args:
        path: The file.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def start(self, epochs: int) -> None:
        """Keeps the existing lines of the first `epochs` epochs."""
        if not self.path.exists():
            return
        try:
            lines = list(csv.DictReader(io.StringIO(read_regular(self.path).decode(), newline="")))
            self.rows = [line for line in lines if int(line["epoch"]) <= epochs]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise VqbeamError(
                f"{self.path} is not as vqbeam writes it; move it elsewhere, and run the same "
                "command to go on"
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Adds a line."""
        self.rows.append(row)
        text = io.StringIO(newline="")
        names = dict.fromkeys(name for line in self.rows for name in line)
        table = csv.DictWriter(text, list(names), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_bytes(self.path, text.getvalue().encode())

    def close(self) -> None:
        """Does nothing: the file is complete after each line."""


class WandbRun:
    """A run on Weights & Biases, continued after a restart.

    Args:
        project: Its project.
        title: Name of the training, the last part of its name.
        config: The run's config, whose settings are shown next to the curves.
        folder: A local folder for its files.
        kept: File that stores its id.
    """

    def __init__(
        self, project: str, title: str, config: Config, folder: epath.Path, kept: epath.Path
    ):
        self.project, self.title, self.config = project, title, config
        self.folder, self.kept = folder, kept
        self.run: Any = None

    def start(self, epochs: int) -> None:
        """Starts the run, or continues the one that was started before."""
        import wandb

        stored = read_json(self.kept) if self.kept.exists() else {}
        is_same = stored.get("project") == self.project
        name = stored["id"] if is_same else uuid.uuid4().hex[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=self.project,
                id=name,
                resume="allow",
                name=f"{self.config.name}: {self.title}",
                config=to_dict(self.config),
                dir=str(self.folder),
                reinit="create_new",  # the calling program may have its own run
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, save_code=False
                ),
            )
        except wandb.Error as error:
            raise VqbeamError(
                f"wandb cannot start a run in the project {self.project}: {first_line(error)}; run "
                "`wandb login`, or set WANDB_MODE=offline"
            ) from error
        write_json(self.kept, {"project": self.project, "id": name})
        if not self.run.offline:
            print(f"{self.title}: {self.run.url}", file=sys.stderr)

    def write(self, row: dict[str, Any]) -> None:
        """Writes the metrics of an epoch at its step; wandb ignores steps that it already has."""
        self.run.log(row, step=row["step"])

    def close(self) -> None:
        """Ends the run, after wandb has sent what is left."""
        if self.run:
            self.run.finish()
