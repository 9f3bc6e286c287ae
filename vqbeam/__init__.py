"""vqbeam: two-stage image generation, from a laptop to a cluster.

    run = vqbeam.open("runs/fashion")      a trained run: sample, encode, decode and more
    vqbeam.VectorQuantizer(512, 64)        a layer for your own Keras models
    vqbeam.EncodeImages("runs/fashion")    transforms for your own Beam pipelines; SampleImages, too

The folders `configs`, `vqvae`, `prior` and `pipelines` are imported as `vqbeam.configs` and so on,
so a folder with one of these names beside a notebook does not shadow them.
"""

import importlib
import pathlib
from typing import Any

# The four packages are inside this folder when installed, and beside it in the repository.
_HERE = pathlib.Path(__file__).parent
if not (_HERE / "configs").is_dir():
    __path__.append(str(_HERE.parent))

# The module of each public name. Imports are lazy because TensorFlow takes seconds to load.
_SOURCES = {
    "EncodeImages": "vqbeam.pipelines.elements",
    "Run": "vqbeam.pipelines.sampling.api",
    "SampleImages": "vqbeam.pipelines.elements",
    "VectorQuantizer": "vqbeam.vqvae.quantizers.layer",
    "VqbeamError": "vqbeam.configs",
    "open": "vqbeam.pipelines.sampling.api",
}
__all__ = ["EncodeImages", "Run", "SampleImages", "VectorQuantizer", "VqbeamError", "open"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'vqbeam' has no attribute {name!r}")
    return getattr(importlib.import_module(_SOURCES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
