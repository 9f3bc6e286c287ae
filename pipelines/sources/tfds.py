"""Datasets of TensorFlow Datasets, which are downloaded and prepared on first use."""

import contextlib
import difflib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions

from vqbeam.configs import DataConfig, VqbeamError, first_line
from vqbeam.pipelines.errors import INTERRUPTED, is_interrupt, user_message
from vqbeam.pipelines.sources.source import RawImage, Source, Unit
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import UNTUNED, damaged_records

_SPLITS = ("train", "validation")
_READ_AT_ONCE = 16  # more is no faster, and photographs may be large


class TfdsSource(Source):
    """`tfds:NAME[/CONFIG][:VERSION]`: two splits of a dataset, or parts of them."""

    def builder(self) -> tfds.core.DatasetBuilder:
        """Returns the builder of the dataset, prepared or not.

        Raises:
            VqbeamError: TFDS has no such dataset.
        """
        name = self.data.source.removeprefix("tfds:")
        try:
            return tfds.builder(name, **self.builder_options())
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            close = difflib.get_close_matches(name.partition("/")[0].partition(":")[0], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see tfds.list_builders()"
            raise VqbeamError(f"TFDS has no dataset {name!r}; {hint}") from error
        except (ValueError, AssertionError) as error:
            raise VqbeamError(f"TFDS refuses {name!r}: {first_line(error)}") from error

    def builder_options(self) -> dict[str, str]:
        """Returns the folder of TFDS's datasets, if the config sets it."""
        return {"data_dir": self.data.data_dir} if self.data.data_dir else {}

    def check(self) -> None:
        """Checks as much of the dataset as is known before a download; see `Source.check`."""
        builder = self.builder()
        if builder.is_prepared():
            self.plan()
        else:
            _labels(self.data, builder.info)

    def download(self, beam_args: Sequence[str]) -> None:
        """Lets TFDS download and prepare the dataset, if needed."""
        builder = self.builder()
        if builder.is_prepared():
            return
        print(self.announcement(builder), flush=True)
        config = tfds.download.DownloadConfig(
            beam_options=PipelineOptions(list(beam_args)),
            manual_dir=self.data.manual_dir,
            try_download_gcs=False,
        )
        try:
            with _ended_by_an_interrupt(), self.quiet():
                builder.download_and_prepare(download_config=config)
        except Exception as error:
            if is_interrupt(error) or user_message(error):
                raise
            if self.builder().is_prepared():  # by another command at the same time
                return
            raise VqbeamError(
                f"TFDS could not prepare {builder.info.full_name} ({first_line(error)}); where its "
                "host cannot be reached, prepare it elsewhere and give its folder by "
                "--data.data-dir"
            ) from error

    def announcement(self, builder) -> str:
        """Returns the line that is printed before the dataset is prepared."""
        return (
            f"{builder.info.full_name} is not in {builder.data_dir} yet: TFDS prepares it there "
            "(if its host cannot be reached, interrupt, and name a prepared copy by "
            "--data.data-dir)"
        )

    def quiet(self) -> contextlib.AbstractContextManager:
        """Returns a context in which TFDS prepares the dataset."""
        return contextlib.nullcontext()

    def listing(self) -> tuple[dict[str, Sequence[Any]], Labels]:
        """Returns the indices of the images in their TFDS splits; see `Source.listing`."""
        data, info = self.data, self.builder().info
        splits = {split: _images_of(info, data, split)[: data.max_images] for split in _SPLITS}
        if _split_of(data, "train") == _split_of(data, "validation") and _overlap(*splits.values()):
            raise VqbeamError(
                f"data.train_split {data.train_split} and data.validation_split "
                f"{data.validation_split} share images; take parts that do not, such as "
                "train[:90%] and train[90%:]"
            )
        return splits, _labels(data, info)

    def keys(self, split: str, images: Sequence[int]) -> list[str]:
        """Returns the ids of TFDS: the name of the file and the example's number in it."""
        theirs = self.builder().info.splits[_split_of(self.data, split)]
        ends = np.cumsum(theirs.shard_lengths)
        files = np.searchsorted(ends, images, side="right")
        rows = np.asarray(images) - (ends - theirs.shard_lengths)[files]
        names = [path.name for path in theirs.filepaths]
        return [f"{names[file]}__{row}" for file, row in zip(files, rows, strict=True)]

    def read(self, unit: Unit) -> Iterator[RawImage]:
        """Yields the encoded images of a slice of a split, or some of it; see `Source.read`.

        `tfds.beam.ReadFromTFDS` reads the same files, with one worker per file, but leaves the
        examples of a one-file dataset in no particular order. Sorting them would shuffle pixels.
        """
        data, builder = self.data, self.builder()
        theirs = _split_of(data, unit.shard.split)
        bounds = unit.images[0], unit.images[-1] + 1
        chosen = unit.images if isinstance(unit.images, range) else {*unit.images}
        wanted = [data.image_key, *([data.label_key] if unit.labels.names else [])]
        examples = builder.as_dataset(
            split=tfds.core.ReadInstruction(theirs, from_=bounds[0], to=bounds[1], unit="abs"),
            decoders=tfds.decode.PartialDecoding(
                dict.fromkeys(wanted, True), decoders={data.image_key: tfds.decode.SkipDecoding()}
            ),
            read_config=tfds.ReadConfig(
                add_tfds_id=True, interleave_cycle_length=1, try_autocache=False
            ),
        )
        with damaged_records(builder.data_path):
            # In batches: reading one by one would take as long as decoding and encoding.
            number = itertools.count(bounds[0])
            batches = examples.ragged_batch(_READ_AT_ONCE).prefetch(2).with_options(UNTUNED)
            for batch in batches:
                keys, images = batch["tfds_id"].numpy(), batch[data.image_key].numpy()
                labels = (
                    _labels_of(batch[data.label_key], unit.labels) if unit.labels.names else None
                )
                for row, image in enumerate(images):
                    if next(number) in chosen:
                        label = labels[row] if labels else -1
                        yield RawImage(os.fsdecode(keys[row]), image, label)


def _split_of(data: DataConfig, split: str) -> str:
    """Returns the TFDS split that the training or validation split is a part of."""
    return getattr(data, f"{split}_split").partition("[")[0]


def _images_of(info, data: DataConfig, split: str) -> range:
    """Returns the indices of the training or validation images in their TFDS split."""
    wanted, theirs = getattr(data, f"{split}_split"), _split_of(data, split)
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(wanted).to_absolute(info.splits)
    except (ValueError, AssertionError) as error:
        raise VqbeamError(
            f"{info.full_name} has no split {wanted!r}; set data.{split}_split to one of "
            f"{', '.join(info.splits)}, or to a part of one, such as train[:90%]"
        ) from error
    return range(info.splits[theirs].num_examples)[part.from_ : part.to]


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _labels(data: DataConfig, info) -> Labels:
    if data.image_key not in info.features:
        raise VqbeamError(
            f"{info.full_name} has no feature {data.image_key!r}; set data.image_key to one of "
            f"{', '.join(info.features)}"
        )
    if not isinstance(info.features[data.image_key], tfds.features.Image):
        raise VqbeamError(
            f"feature {data.image_key!r} of {info.full_name} holds no image; set data.image_key"
        )
    dtype = info.features[data.image_key].np_dtype
    if dtype not in (
        np.uint8,
        np.uint16,
    ):  # TFDS stores the bytes of floats as if they were colours
        raise VqbeamError(
            f"feature {data.image_key!r} of {info.full_name} holds images of {np.dtype(dtype)}; "
            "prepare a dataset of uint8 images, or a folder of image files"
        )
    # The default name may be missing: most datasets without classes do not have it.
    if data.label_key not in (*info.features, DataConfig.label_key, "none"):
        raise VqbeamError(
            f"{info.full_name} has no feature {data.label_key!r}; set data.label_key to one of "
            f"{', '.join(info.features)}, or to none"
        )
    label = info.features[data.label_key] if data.label_key in info.features else None
    if isinstance(label, tfds.features.ClassLabel):
        return Labels(tuple(label.names))
    if _is_multi_hot(label):
        return Labels(tuple(label.feature.names), "attributes")
    if _is_flags(label):
        return Labels(tuple(label), "attributes")
    if data.label_key not in (DataConfig.label_key, "none"):
        raise VqbeamError(
            f"feature {data.label_key!r} of {info.full_name} holds neither classes nor attributes; "
            "set data.label_key to one that does, or to none"
        )
    return Labels()


def _is_multi_hot(label) -> bool:
    """Returns whether a feature is a list of the classes of an image."""
    is_list = isinstance(label, tfds.features.Sequence)
    return is_list and isinstance(label.feature, tfds.features.ClassLabel)


def _is_flags(label) -> bool:
    """Returns whether a feature is a dictionary with a bool for each attribute."""
    is_dict = isinstance(label, tfds.features.FeaturesDict)
    return is_dict and all(
        feature.shape == () and feature.np_dtype == np.bool_ for feature in label.values()
    )


def _labels_of(values, labels: Labels) -> list[int] | list[tuple[int, ...]]:
    """Returns the labels of a batch, as in `RawImage`."""
    if labels.kind == "classes":
        return values.numpy().tolist()
    if isinstance(values, dict):
        columns = [values[name].numpy().astype(int).tolist() for name in labels.names]
        return list(zip(*columns, strict=True))
    numbers = range(len(labels.names))
    lists = values.to_list() if isinstance(values, tf.RaggedTensor) else values.numpy().tolist()
    return [tuple(int(number in of_image) for number in numbers) for of_image in lists]


@contextlib.contextmanager
def _ended_by_an_interrupt() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once, without waiting for TFDS's downloads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_):
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
