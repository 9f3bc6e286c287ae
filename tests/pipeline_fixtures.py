"""Small datasets and configs that the tests of the pipeline share."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from vqbeam.configs import Config, DataConfig, override

# As a folder lists them; their order is not that of their lower case.
CLASSES = ("Banana", "apple", "cherry")
SIDE = 8


def small_config(source, **changes):
    """A config that trains in a moment; `vqvae__steps=4` sets the field `vqvae.steps`."""
    config = Config(name="small", data=DataConfig(source=source, height=SIDE, width=SIDE))
    small = {
        "data.images_per_shard": 6,
        "vqvae.num_codes": 12,
        "vqvae.code_dim": 4,
        "vqvae.width": 8,
        "vqvae.residual_layers": 1,
        "vqvae.residual_width": 4,
        "vqvae.batch_size": 8,
        "vqvae.steps": 4,
        "vqvae.steps_per_epoch": 2,
        "encode.batch_size": 4,
        "prior.layers": 1,
        "prior.width": 16,
        "prior.heads": 2,
        "prior.batch_size": 8,
        "prior.steps": 4,
        "prior.steps_per_epoch": 2,
        "prior.warmup_steps": 1,
        "prior.pictures": 0,  # a sampler takes seconds to compile
        "sample.num": 7,
        "sample.batch_size": 3,
    }
    return override(config, small | {k.replace("__", "."): v for k, v in changes.items()})


def write_preset(path, config):
    """Writes a preset file that sets CONFIG to `config`."""
    path.write_text(f"from vqbeam.configs import *\n\nCONFIG = {config!r}\n")
    return path


def png_chunk(kind, content):
    """Returns a chunk of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(image):
    """Returns an image, uint8 [H, W, 3], as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def write_images(folder, count=24, *, classes=CLASSES, seed=0):
    """Writes PNG files of noise, `classes` in turn; returns their pixels by key."""
    numbers = np.random.default_rng(seed)
    pixels = {}
    for index in range(count):
        key = f"{index:03d}.png"
        if classes:
            key = f"{classes[index % len(classes)]}/{key}"
        pixels[key] = numbers.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(png(pixels[key]))
    return pixels


def write_tfds(data_dir, name, version, image_shape, splits, label_names, texts=(), kind="classes"):
    """Writes noise as TFDS would have prepared a dataset; returns it as `read_tfds` does.

    Args:
        data_dir: Folder in which TFDS looks for datasets.
        name: For example "cifar10", or "imagenet_resized/64x64".
        version: For example "3.0.2".
        image_shape: (H, W, C).
        splits: Number of images in each split.
        label_names: The classes.
        texts: Names of further features.
        kind: What `label` holds: "classes", one of them; "flags", a dict of bools; or "list", a
            list of classes. Image i has those whose bit is set in i.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from shard_files import write_shard

    from vqbeam.vqvae.storage.records import Shard

    folder = epath.Path(data_dir) / name / version
    folder.mkdir(parents=True)
    dataset = name.partition("/")[0]
    one_class = tfds.features.ClassLabel(names=list(label_names))
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=image_shape, encoding_format="png"),
            "label": {
                "classes": one_class,
                "flags": tfds.features.FeaturesDict(dict.fromkeys(label_names, np.bool_)),
                "list": tfds.features.Sequence(one_class),
            }[kind],
            **{text: tfds.features.Text() for text in texts},
        }
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=dataset, filetype_suffix="tfrecord"
    )
    numbers = np.random.default_rng(0)

    def label(i):
        on = [i >> bit & 1 for bit in range(len(label_names))]
        return {
            "classes": i % len(label_names),
            "flags": dict(zip(label_names, map(bool, on), strict=True)),
            "list": np.flatnonzero(on),
        }[kind]

    infos, written = [], {}
    for split, count in splits.items():
        written[split] = [
            (numbers.integers(0, 256, image_shape, np.uint8), label(i)) for i in range(count)
        ]
        records = [
            features.serialize_example(
                features.encode_example(
                    {"image": image, "label": label} | dict.fromkeys(texts, "x")
                )
            )
            for image, label in written[split]
        ]
        size = write_shard(folder / Shard(dataset, split, 0, 1).filename, records)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[count],
                num_bytes=size,
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=version,
        check_data=False,
    )
    return written


def read_records(folder):
    """Returns the decoded examples of a folder of shards, by split, in order."""
    from vqbeam.vqvae.storage.records import open_dataset, read_split

    builder = open_dataset(folder)
    return {
        split: list(read_split(builder, split).as_numpy_iterator()) for split in builder.info.splits
    }


def gathered(add_facts, shards):
    """Returns what a stage of Beam would make of `(run path, report)` before its last step."""
    from vqbeam.pipelines.beam import GatherReports

    combine = GatherReports(add_facts)
    found = combine.create_accumulator()
    for _, report in shards:
        found = combine.add_input(found, report)
    return found


def read_keys(folder):
    """Returns the keys of the examples of a folder of shards, all splits together."""
    return [e["key"].decode() for examples in read_records(folder).values() for e in examples]


def assert_same_run(run, expected):
    """Checks that two runs hold the same images, codes and picture, in the same order."""
    for stage in ("prepare", "encode"):
        found, wanted = (read_records(which.folder(stage)) for which in (run, expected))
        assert found.keys() == wanted.keys()
        for split, examples in wanted.items():
            assert len(found[split]) == len(examples) > 0
            for ours, theirs in zip(found[split], examples, strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in theirs.items():
                    np.testing.assert_array_equal(ours[name], value, err_msg=name)
    np.testing.assert_array_equal(drawn_pixels(run), drawn_pixels(expected))


def drawn_pixels(run):
    """Returns the picture of a run's new images; its file names the models' layers as well."""
    return np.asarray(Image.open(run.folder("sample") / "samples.png"))


def finish_again(run, stage, **changes):
    """Writes a stage's manifest anew, with some facts changed, as if it had run a second time."""
    told = run.manifest(stage)
    made = ("stage", "inputs", "made_from", "sha256")
    facts = {name: told[name] for name in told if name not in made}
    outputs = [run.folder(stage) / name for name in facts.pop("outputs")]
    run.begin(stage)
    del facts["seconds"]
    run.finish(stage, outputs, **facts | changes)


def write_measures(run, name, **measures):
    """Writes metrics as if `vqbeam evaluate` had measured them of the present models."""
    measures |= {"models": run.measured_models(name)}
    run.evaluation.mkdir(exist_ok=True)
    (run.evaluation / f"{name}.json").write_text(json.dumps(measures))
    return measures


def shard_contents(folder):
    """Returns the bytes of each shard of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.tfrecord-*")}


def run_transform(transform, run, *flags):
    """Runs a stage's transform over a run by Beam's local runner."""
    from apache_beam import Create
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.testing.test_pipeline import TestPipeline
    from apache_beam.testing.util import assert_that, equal_to

    options = PipelineOptions(["--runner=FnApiRunner", *flags])
    with TestPipeline(options=options) as pipeline:
        assert_that(
            pipeline | Create([str(run.root)]) | transform,
            equal_to([str(run.root)]),
        )


TWO_THREADS = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
