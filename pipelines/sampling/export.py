"""The command that exports a run as a SavedModel, for programs without vqbeam and Keras."""

import os
import uuid

import keras
import tensorflow as tf
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.prior.serving import serving_signatures


def export(run_dir: str, output: str) -> None:
    """Writes the models of a run as a SavedModel, atomically, and prints its signatures.

    Args:
        run_dir: Folder of a run with both models.
        output: A new or empty folder. For TensorFlow Serving its name must be the version number.

    Raises:
        VqbeamError: The run lacks a model, the folder is not empty, or the backend of Keras is not
            TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise VqbeamError(
            f"export writes a TensorFlow SavedModel, and KERAS_BACKEND is "
            f"{keras.backend.backend()!r}; unset it"
        )
    folder = epath.Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise VqbeamError(f"{folder} is there already; choose another --output, or delete it")
    run = Run(run_dir)
    signatures = serving_signatures(run.vqvae, run.prior, run.default_settings())
    module = tf.Module()
    module.weights = [variable.value for variable in (*run.vqvae.variables, *run.prior.variables)]
    _save(module, signatures, folder)
    for name, function in signatures.items():
        inputs = {spec.name: spec for spec in tf.nest.flatten(function.structured_input_signature)}
        print(f"{name:<20}  {_listed(inputs)}")
        print(f"{'':<20}  → {_listed(function.structured_outputs)}")
    print(f"SavedModel: {folder}")


def _save(module: tf.Module, signatures: dict, folder: epath.Path) -> None:
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        tf.saved_model.save(module, os.fspath(temporary), signatures=signatures)
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise


def _listed(specs: dict) -> str:
    """Returns names, dtypes and shapes as text; "?" stands for any size."""
    return ", ".join(
        f"{name} {spec.dtype.name} [{', '.join('?' if n is None else str(n) for n in spec.shape)}]"
        for name, spec in sorted(specs.items())
    )
