"""One measurement of `throughput.py`, in its own process; imports are not counted."""

import os
import pathlib
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import dataclasses

import keras
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from measuring import report

import vqbeam.pipelines.stages.transforms  # noqa: F401  otherwise `run_stages` imports it, and Beam with it
from vqbeam.pipelines.run import run_stages
from vqbeam.vqvae.fitting.devices import compiled_encoder
from vqbeam.vqvae.storage.records import Shard, open_dataset, write_metadata
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import MODEL_FILE, load_vqvae

LOCAL = ["--runner=FnApiRunner"]


def repeated(source: epath.Path, folder: epath.Path, split: str, count: int) -> list[epath.Path]:
    """Makes a TFDS dataset with `count` images of a split, as hard links; returns its files.

    The count is rounded up to whole shards.
    """
    builder = tfds.builder_from_directory(source)
    info = builder.info.splits[split]
    lengths, files, splits = [], [], {}
    while sum(lengths) < count:
        lengths.append(info.shard_lengths[len(lengths) % info.num_shards])
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        split: lengths,
        **{s: i.shard_lengths for s, i in builder.info.splits.items() if s != split},
    }
    for name, shards in names.items():
        known = builder.info.splits[name].filepaths
        for index, length in enumerate(shards):
            path = folder / Shard(builder.name, name, index, len(shards)).filename
            os.link(known[index % len(known)], path)
            files.append(path)
            splits.setdefault(name, []).append((length, path.stat().length))
    files += write_metadata(
        folder,
        builder.info.features,
        splits,
        name=builder.name,
        version=str(builder.version),
        description="Images repeated, for a benchmark.",
    )
    return files


def scratch_run(run: RunFolder, scratch: pathlib.Path, count: int) -> RunFolder:
    """Returns a run with the model of another run, and its training images repeated."""
    new = RunFolder(scratch / "run")
    new.start(run.load_config())
    for stage in ("prepare", "train-vqvae"):
        facts = run.require(stage)
        new.begin(stage)
        if stage == "prepare":
            files = repeated(run.folder(stage), new.folder(stage), "train", count)
        else:
            files = [new.folder(stage) / MODEL_FILE]
            os.link(run.folder(stage) / MODEL_FILE, files[0])
        for name in ("stage", "inputs", "outputs", "seconds", "sha256"):
            facts.pop(name, None)
        new.finish(stage, files, **facts)
    return new


def bare_encode(run: RunFolder) -> None:
    """Encodes the images in a plain loop over the same records."""
    batch_size = run.load_config().encode.batch_size
    encode = compiled_encoder(load_vqvae(run))
    splits = open_dataset(run.folder("prepare")).info.splits
    files = [path for split in splits.values() for path in split.filepaths]
    shape = run.load_config().image_shape

    def decoded(record):
        feature = {"image": tf.io.FixedLenFeature([], tf.string)}
        image = tf.io.decode_png(tf.io.parse_single_example(record, feature)["image"], shape[-1])
        return tf.ensure_shape(image, shape)

    batches = tf.data.TFRecordDataset(files).map(decoded).batch(batch_size).prefetch(2)
    for images in batches:
        keras.ops.convert_to_numpy(encode(images))


def bare_prepare(dataset, splits: dict[str, int], scratch: pathlib.Path) -> None:
    """Decodes and encodes the images of a dataset with tf.data, and writes them as records."""
    config = tfds.ReadConfig(add_tfds_id=True)
    for split, count in splits.items():
        examples = dataset.as_dataset(split=f"{split}[:{count}]", read_config=config)

        def packed(example):
            return tf.io.encode_png(example["image"]), example["label"], example["tfds_id"]

        with tf.io.TFRecordWriter(str(scratch / f"{split}.tfrecord")) as writer:
            for image, label, key in examples.map(packed).prefetch(64).as_numpy_iterator():
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                    "key": tf.train.Feature(bytes_list=tf.train.BytesList(value=[key])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())


def main() -> None:
    """Sets up and runs one measurement, and reports its time and memory."""
    work, side, run_dir, data_dir, count, scratch = sys.argv[1:]
    run, scratch, count = RunFolder(run_dir), pathlib.Path(scratch), int(count)
    config = run.load_config()
    if work == "encode":
        new = scratch_run(run, scratch, count)
        dataset = open_dataset(new.folder("prepare"))
    else:
        name, new_data = "cifar10/3.0.2", epath.Path(scratch / "data")
        repeated(epath.Path(data_dir) / name, new_data / name, "train", count)
        data = dataclasses.replace(config.data, data_dir=str(new_data), max_images=count)
        config = dataclasses.replace(config, data=data)
        dataset = tfds.builder("cifar10", data_dir=new_data)
    splits = {name: split.num_examples for name, split in dataset.info.splits.items()}
    if work == "prepare":  # which reads at most max_images images of a split
        splits = {name: min(count, size) for name, size in splits.items()}
    start, cpu = time.perf_counter(), time.process_time()
    if side == "beam":
        run_stages(config, str(scratch / "run"), (work,), LOCAL)
    elif work == "encode":
        bare_encode(new)
    else:
        bare_prepare(dataset, splits, scratch)
    report(
        work,
        side,
        seconds=time.perf_counter() - start,
        cpu=time.process_time() - cpu,
        bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        images=sum(splits.values()),
    )


if __name__ == "__main__":
    main()
