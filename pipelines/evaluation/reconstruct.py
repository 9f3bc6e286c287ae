"""Held-out images of a run above their reconstructions."""

import numpy as np
from etils import epath

from vqbeam.pipelines.cli.verbs import VERBS
from vqbeam.pipelines.places import check_output
from vqbeam.vqvae.figures import reconstruction_figure, save_png
from vqbeam.vqvae.storage.records import damaged_records, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae
from vqbeam.vqvae.training import reconstruct as reconstruct_images


def reconstruct(run_dir: str, output: str, num: int = 16) -> None:
    """Draws the first `num` images of the validation split above their reconstructions.

    Raises:
        VqbeamError: The run has no trained VQ-VAE, or `output` does not end in .png.
    """
    check_output(output, VERBS["reconstruct"].outputs)
    path = epath.Path(output).expanduser()
    run = RunFolder(run_dir)
    run.load_config()
    model = load_vqvae(run)
    run.require("prepare")
    builder = open_dataset(run.folder("prepare"))
    size = builder.info.splits["validation"].num_examples
    with damaged_records(run.folder("prepare")):
        examples = read_split(builder, "validation", last=min(num, size))
        images = np.stack([example["image"] for example in examples.as_numpy_iterator()])
    save_png(reconstruction_figure(images, reconstruct_images(model, images)), path)
    print(f"originals above their reconstructions, {len(images)} of each: {path}")
