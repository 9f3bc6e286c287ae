"""Exports for other programs: the models of a run, and its codes as NumPy arrays or Parquet."""

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.weights import check_exportable, write_weights
from vqbeam.prior.sampler import in_precision
from vqbeam.prior.serving import serving_signatures
from vqbeam.vqvae.storage.files import write_bytes, write_folder
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import damaged_records, label_of, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder


def export(run_dir: str, output: str, form: str = "savedmodel") -> None:
    """Writes the models of a run, completely or not at all, and prints what was written.

    Args:
        run_dir: Folder of a run with both models.
        output: A new or empty folder. For TensorFlow Serving, its name must be the version number.
        form: "savedmodel", with signatures to sample, encode and decode; or "safetensors", the
            weights with the names that other libraries use.

    Raises:
        VqbeamError: The run lacks a model, the folder is not empty, a SavedModel is requested but
            Keras's backend is not TensorFlow, or the VQ-VAE has no counterpart in diffusers.
    """
    if form == "safetensors":
        check_exportable(RunFolder(run_dir))
    elif keras.backend.backend() != "tensorflow":
        raise VqbeamError(
            f"export writes a TensorFlow SavedModel, and KERAS_BACKEND is "
            f"{keras.backend.backend()!r}; unset it"
        )
    folder = epath.Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise VqbeamError(f"{folder} is there already; choose another --output, or delete it")
    run = Run(run_dir)
    if form == "safetensors":
        write_folder(folder, lambda place: write_weights(run, place))
        print(f"for diffusers' VQModel.from_pretrained: {folder / 'vqvae'}")
        print(f"the prior, with LlamaGen's names: {folder / 'prior'}")
        return
    settings = run.default_settings()
    prior = in_precision(run.prior, settings.precision)
    signatures = serving_signatures(run.vqvae, prior, settings)
    module = tf.Module()
    module.weights = [variable.value for variable in (*run.vqvae.variables, *prior.variables)]
    write_folder(
        folder, lambda place: tf.saved_model.save(module, os.fspath(place), signatures=signatures)
    )
    for name, function in signatures.items():
        inputs = {spec.name: spec for spec in tf.nest.flatten(function.structured_input_signature)}
        print(f"{name:<20}  {_listed(inputs)}")
        print(f"{'':<20}  → {_listed(function.structured_outputs)}")
    print(f"SavedModel: {folder}")


def _listed(specs: dict) -> str:
    """Returns names, dtypes and shapes as text, where "?" stands for any size."""
    return ", ".join(
        f"{name} {spec.dtype.name} [{', '.join('?' if n is None else str(n) for n in spec.shape)}]"
        for name, spec in sorted(specs.items())
    )


_ROWS = 4096  # rows read at once, and in a Parquet row group


def export_codes(run_dir: str, output: str) -> str:
    """Writes the codes of a run, with keys, splits, labels and codebook, as one file.

    Args:
        run_dir: Folder of a run whose images are encoded.
        output: The .npz or .parquet file to write, which is built in memory.

    Returns:
        A line about the result.

    Raises:
        VqbeamError: The run has no codes, or they are damaged.
    """
    run, path = Run(run_dir), epath.Path(output).expanduser()
    manifest = run.folder.require("encode")
    labels, layout = Labels.of(manifest), run.vqvae.layout
    facts = {
        "shape": list(layout.shape),
        "num_codes": layout.num_codes,
        "label_names": list(labels.names),
        "label_kind": labels.kind,
        "vqvae": run.folder.result_hash("train-vqvae"),
    }
    write = _as_arrays if path.suffix == ".npz" else _as_parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    with damaged_records(run.folder.folder("encode")):
        data = write(_code_batches(run, manifest["counts"]), facts, run.codebook)
    write_bytes(path, data)
    return f"codes of {sum(manifest['counts'].values()):,} images: {path}"


def _code_batches(run: Run, splits: dict[str, int]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of batches of records, one split after the other."""
    builder = open_dataset(run.folder.folder("encode"))
    dtype = np.min_scalar_type(run.vqvae.layout.num_codes - 1)

    def columns(example):
        return {"key": example["key"], "codes": example["codes"], "label": label_of(example)}

    for split in splits:
        records = read_split(builder, split).map(columns).batch(_ROWS)
        for batch in records.as_numpy_iterator():
            keys = np.array([os.fsdecode(key) for key in batch["key"]])
            yield {
                "key": keys,
                "split": np.full(len(keys), split),
                "label": batch["label"],
                "codes": batch["codes"].astype(dtype),
            }


def _as_arrays(batches: Iterator[dict], facts: dict[str, Any], codebook: np.ndarray) -> bytes:
    columns = list(batches)
    arrays = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    data = io.BytesIO()
    np.savez(data, **arrays, codebook=codebook, vqbeam=np.array(json.dumps(facts)))
    return data.getvalue()


def _as_parquet(batches: Iterator[dict], facts: dict[str, Any], codebook: np.ndarray) -> bytes:
    vectors, data = io.BytesIO(), io.BytesIO()
    np.save(vectors, codebook)
    metadata = {"vqbeam": json.dumps(facts), "codebook": vectors.getvalue()}
    writer = None
    for batch in batches:
        table = pa.table({name: _column(values) for name, values in batch.items()})
        table = table.replace_schema_metadata(metadata)
        writer = writer or pyarrow.parquet.ParquetWriter(data, table.schema)
        writer.write_table(table)
    writer.close()
    return data.getvalue()


def _column(values: np.ndarray) -> pa.Array:
    """Returns a column; if values are arrays, each row is a list of all numbers of one."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(values.reshape(-1), values[0].size)
