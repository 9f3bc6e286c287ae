"""Compares the sources of images with TFDS, and measures the memory that Parquet files take.

    python benchmarks/sources.py --data-dir ~/tensorflow_datasets --model runs/cifar10
    python benchmarks/sources.py --smoke

Other programs write the test images of CIFAR-10 as Parquet (pandas), WebDataset, tf.train.Example
and .npz. Each source must give the images and labels that TFDS gives. With `--model`, each is
encoded by a process that is killed in the middle and started again, and must give the codes that
the model's own `encode` gives. The second table has the peak memory of `vqbeam prepare` for Parquet
files of 20,000 and of 200,000 small images.
"""

import argparse
import io
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd
from measuring import SMOKE
from PIL import Image

KINDS = ("array", "parquet", "tfrecord", "webdataset")
COUNTS = (200, 400) if SMOKE else (20_000, 200_000)


def main() -> None:
    """Prints both tables; raises an AssertionError if a source differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="few random images, without TFDS")
    parser.add_argument("--data-dir", help="where TFDS keeps cifar10")
    parser.add_argument("--images", type=int, default=10_000, help="number of test images")
    parser.add_argument("--model", help="a run on cifar10, whose VQ-VAE encodes the images")
    parser.add_argument("--skip-memory", action="store_true", help="only the comparison")
    parser.add_argument("--skip-comparison", action="store_true", help="only the memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        if not arguments.skip_comparison:
            compare(work, arguments)
        if not arguments.skip_memory:
            measure_memory(work)


def compare(work: pathlib.Path, arguments: argparse.Namespace) -> None:
    """Prints the table of the comparison."""
    if SMOKE:
        numbers = np.random.default_rng(0)
        images = numbers.integers(0, 256, (60, 32, 32, 3), np.uint8)
        labels = numbers.integers(0, 10, 60)
    else:
        images, labels = of_tfds(arguments.data_dir, arguments.images)
    heads, codes = ["source", "images and labels"], None
    if arguments.model:
        import vqbeam

        codes = vqbeam.open(arguments.model).encode(images)
        heads.append("codes, after a kill")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind in KINDS:
        path = written(work / kind, kind, images, labels)
        check_images(f"{kind}:{path}", images, labels)
        row = [kind, f"{len(images):,} of {len(images):,} the same"]
        if codes is not None:
            killed_at = encode(work / f"{kind}-codes", f"{kind}:{path}", arguments.model)
            check_codes(work / f"{kind}-codes", codes, labels)
            row.append(f"the same; killed after {killed_at} of its shards")
        print(f"| {' | '.join(row)} |", flush=True)


def of_tfds(data_dir: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first test images of CIFAR-10 and their labels, in TFDS's order."""
    import tensorflow_datasets as tfds

    dataset = tfds.load("cifar10", split=f"test[:{count}]", data_dir=data_dir, batch_size=-1)
    return dataset["image"].numpy(), dataset["label"].numpy()


def written(
    folder: pathlib.Path, kind: str, images: np.ndarray, labels: np.ndarray
) -> pathlib.Path:
    """Writes images as a file of a kind, with the program of that kind; returns the folder."""
    folder.mkdir()
    if kind == "array":
        np.savez(folder / "all.npz", images=images, labels=labels)
        return folder
    contents = [png(image) for image in images]
    if kind == "parquet":
        cells = [{"bytes": content, "path": None} for content in contents]
        table = pd.DataFrame({"image": cells, "label": labels})
        table.to_parquet(folder / "all.parquet", row_group_size=1000)
    elif kind == "webdataset":
        import webdataset

        with webdataset.TarWriter(str(folder / "all.tar")) as tar:
            for number, (content, label) in enumerate(zip(contents, labels, strict=True)):
                tar.write({"__key__": f"{number:06}", "png": content, "cls": str(label)})
    else:
        write_examples(folder / "all.tfrecord", contents, labels)
    return folder


def write_examples(path: pathlib.Path, contents: list[bytes], labels: np.ndarray) -> None:
    """Writes tf.train.Examples."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for content, label in zip(contents, labels, strict=True):
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[content]))
            number = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
            features = tf.train.Features(feature={"image": image, "label": number})
            writer.write(tf.train.Example(features=features).SerializeToString())


def png(image: np.ndarray) -> bytes:
    """Returns an image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def check_images(source: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raises an AssertionError unless a source gives these images, in this order."""
    from vqbeam.configs import DataConfig
    from vqbeam.pipelines.sources import open_source

    data = DataConfig(source=source, validation_share=0.0)
    opened = open_source(data)
    found = [(unit, raw) for unit in opened.plan() for raw in opened.read(unit)]
    assert len(found) == len(images), (source, len(found))
    for (unit, raw), image, label in zip(found, images, labels, strict=True):
        np.testing.assert_array_equal(opened.decode(raw), image)
        assert unit.labels.names[raw.label] == str(label), (source, raw.key)


def encode(output: pathlib.Path, source: str, model: str) -> int:
    """Encodes images into a folder, killed once; returns the number of shards at that time."""
    words = ["encode", "--model", model, "--data.source", source, "--output", str(output)]
    command = [sys.executable, "-m", "vqbeam", *words, "--data.images-per-shard", "1000"]
    with open(output.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None and not list(output.glob("codes-*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        shards = len(list(output.glob("codes-*")))
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return shards


def check_codes(folder: pathlib.Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """Raises an AssertionError unless a folder has these codes, in this order."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    split = builder.as_dataset(split="train", batch_size=-1, read_config=in_order)
    np.testing.assert_array_equal(split["codes"].numpy(), codes)
    names = builder.info.features["label"].names
    assert [names[label] for label in split["label"].numpy()] == list(map(str, labels))


def measure_memory(work: pathlib.Path) -> None:
    """Prints the table of memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    contents = [png(image) for image in pixels]
    print("\n| images in Parquet | peak memory of `vqbeam prepare` |\n|---|---|")
    for count in COUNTS:
        folder = work / str(count)
        folder.mkdir()
        numbers = np.arange(count)
        cells = [{"bytes": contents[number % 100], "path": None} for number in numbers]
        table = pd.DataFrame({"image": cells, "label": numbers % 10})
        table.to_parquet(folder / "all.parquet", row_group_size=1000)
        words = ["prepare", "photos", "--run-dir", str(folder / "run")]
        words += ["--data.source", f"parquet:{folder}", "--data.height", "8", "--data.width", "8"]
        process = subprocess.Popen(
            [sys.executable, "-m", "vqbeam", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, f"vqbeam {' '.join(words)} failed"
        print(f"| {count:,} | {usage.ru_maxrss / 2**10:,.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
