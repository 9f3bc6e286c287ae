"""The stage `encode`: from prepared images, and augmented views of them, to codes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.beam import Gathered, ShardedStage, advance
from vqbeam.pipelines.stages.shards import (
    ShardReport,
    ShardWriter,
    remove_leftovers,
    write_dataset_metadata,
)
from vqbeam.vqvae.augmentation import variant_count, variants
from vqbeam.vqvae.fitting.devices import compiled_encoder, in_batches
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.metrics import by_level, count_codes, perplexity
from vqbeam.vqvae.storage.records import (
    CODES_VERSION,
    Shard,
    code_features,
    damaged_records,
    image_batches,
    labels_of,
    open_dataset,
    serialize,
)
from vqbeam.vqvae.storage.run_folder import HASH_DIGITS, RunFolder
from vqbeam.vqvae.training import load_vqvae

STAGE = "encode"
DATASET = "codes"
_model = Shared()


class EncodeStage(ShardedStage):
    """Encodes the images of a run; takes and returns the path of the run.

    Each process loads the model once.
    """

    def __init__(self):
        super().__init__(
            STAGE, plan=plan_shards, write=encode_shard, add=add_facts, finish=finish_codes
        )


class ImageShard(NamedTuple):
    """A shard to encode.

    Attributes:
        shard: The shard to write.
        images: The number of images in it.
        augment: Views to encode in addition to the images; see `vqbeam.vqvae.augmentation`.
        total: Number of code grids in all shards, for the progress bar.
    """

    shard: Shard
    images: int
    augment: str
    total: int


def plan_shards(run_path: str) -> Iterator[tuple[str, ImageShard]]:
    """Starts the stage and yields the shards to encode."""
    run = RunFolder(run_path)
    run.require("prepare")
    run.begin(STAGE)
    # Validation images are not augmented, so that their metrics stay comparable.
    augment = {"train": run.load_config().encode.augment}
    splits = open_dataset(run.folder("prepare")).info.splits
    total = sum(
        split.num_examples * variant_count(augment.get(split.name, "none"))
        for split in splits.values()
    )
    for split in splits.values():
        for index, images in enumerate(split.shard_lengths):
            shard = Shard(DATASET, split.name, index, len(split.shard_lengths))
            yield run_path, ImageShard(shard, images, augment.get(split.name, "none"), total)


def encode_shard(run_path: str, part: ImageShard) -> tuple[str, ShardReport]:
    """Encodes one shard of images and writes it as one shard of `DIR/codes`."""
    run = RunFolder(run_path)
    writer = ShardWriter(run.folder(STAGE), run.fingerprint(STAGE), part.shard)
    if writer.report:
        advance(STAGE, part.images * variant_count(part.augment), part.total)
    else:
        layout = code_layout(run.load_config())
        counts = np.zeros((layout.levels, layout.num_codes), np.int64)
        with damaged_records(run.folder("prepare")), writer:
            for suffix, codes, batch in one_ahead(_encoded(run, part)):
                counts += count_codes(codes, layout)
                advance(STAGE, len(codes), part.total)
                for i, of_image in enumerate(codes):
                    own = {name: values[i] for name, values in batch.items()}
                    example = own | {"codes": of_image, "key": own["key"] + suffix}
                    writer.write(serialize(example))
            writer.facts["code_counts"] = counts.tolist()
    Metrics.counter("vqbeam", "images_encoded").inc(writer.report.records)
    return run_path, writer.report


def _encoded(run: RunFolder, part: ImageShard) -> Iterator[tuple[bytes, np.ndarray, dict]]:
    """Yields, for each batch and view, the suffix of its keys, its codes and its other fields."""
    encode = load_encoder(run, run.result_hash("train-vqvae"))
    batch_size = run.load_config().encode.batch_size
    builder = open_dataset(run.folder("prepare"))
    batches = image_batches(builder, part.shard.split, part.shard.index, batch_size)
    for batch in batches.as_numpy_iterator():
        originals = batch.pop("image")
        for suffix, images in variants(originals, part.augment):
            yield suffix.encode(), in_batches(encode, images, batch_size), batch


def one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yields the items of an iterator, computing the next one in a thread."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def add_facts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the combined facts of two groups of shards."""
    return {"code_counts": np.add(one["code_counts"], other["code_counts"])}


def finish_codes(run_path: str, gathered: Gathered) -> str:
    """Finishes the dataset and records the codebook usage; returns the run's path."""
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return run_path  # a runner may repeat a finished step
    config = run.load_config()
    layout, labels = code_layout(config), labels_of(open_dataset(run.folder("prepare")))
    files, counts = write_dataset_metadata(
        run.folder(STAGE),
        gathered.reports,
        code_features(layout, labels),
        version=CODES_VERSION,
        description=f"Codes of {config.data.source}: {layout.describe()}.",
    )
    use = np.asarray(gathered.facts["code_counts"])  # [levels, K]
    run.finish(
        STAGE,
        files,
        counts=counts,
        label_names=labels.names,
        label_kind=labels.kind,
        perplexity=by_level([perplexity(counts) for counts in use]),
        codes_used=by_level(np.count_nonzero(use, axis=1).tolist()),
    )
    remove_leftovers(run.folder(STAGE), files, run.fingerprint(STAGE))
    return run_path


def load_encoder(run: RunFolder, model: str) -> Callable[[Any], Any]:
    """Returns the compiled encoder of a run's VQ-VAE, which each process loads once.

    Args:
        run: The run.
        model: The hash of the expected VQ-VAE, from `run.result_hash("train-vqvae")`.

    Raises:
        VqbeamError: The run now has another VQ-VAE.
    """

    def load():
        found = run.result_hash("train-vqvae")
        if found != model:
            raise VqbeamError(
                f"the VQ-VAE of {run.root} is {(found or 'none')[:HASH_DIGITS]} and no longer "
                f"{model[:HASH_DIGITS]}; it was trained again meanwhile: start anew with the one "
                "there is"
            )
        return _Encoder(compiled_encoder(load_vqvae(run)))

    return _model.acquire(load, tag=f"{run.root} {model}")


class _Encoder:
    """The compiled function wrapped in an object, since `Shared` needs weak references to it."""

    def __init__(self, function):
        self.function = function

    def __call__(self, images):
        return self.function(images)
