"""vqbeam: two-stage image generation, from a laptop to a cluster.

The folders `configs`, `vqvae`, `prior` and `pipelines` are the packages `vqbeam.configs` and so on:
a folder of one of these names beside a notebook does no harm.
"""

import pathlib

# Installed, the four packages lie in this folder; in the repository they lie beside it.
_HERE = pathlib.Path(__file__).parent
if not (_HERE / "configs").is_dir():
    __path__.append(str(_HERE.parent))
