"""Metrics of a run's VQ-VAE on its complete validation split, and a figure of reconstructions."""

from collections.abc import Iterable

import keras
import numpy as np
from etils import epath

from vqbeam.pipelines.evaluation.distances import Moments, frechet_distance
from vqbeam.pipelines.evaluation.features import Extract, feature_extractor, label_obstacle
from vqbeam.vqvae.figures import reconstruction_figure, save_png
from vqbeam.vqvae.fitting.devices import compiled_decoder, compiled_encoder
from vqbeam.vqvae.fitting.progress import ProgressBar
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.metrics import (
    bits_per_image,
    by_level,
    compression_ratio,
    count_codes,
    nmse,
    perplexity,
    psnr,
    ssim,
)
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.files import write_json
from vqbeam.vqvae.storage.records import damaged_records, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae
from vqbeam.vqvae.training import reconstruct as reconstruct_images


def evaluate_vqvae(run: RunFolder, features: str = "classifier") -> dict:
    """Returns the metrics of a run's VQ-VAE, and writes them to `evaluation/vqvae.json`.

    Reconstructions are measured as uint8 images, and the Fréchet distance to their originals.

    Args:
        run: A run with prepared images and a trained VQ-VAE.
        features: See `vqbeam.pipelines.evaluation.features.feature_extractor`.

    Returns:
        `images`, their number; `mse` over all pixels, on the scale of 0 to 255; `nmse`, the same in
        units of the training pixels' variance; `psnr` in dB, from `mse`; `ssim`, the mean over
        images; `frechet` and its `feature_dim`, or None with the reason in `frechet_left_out`;
        `perplexity` and `codes_used` over the split, lists if there are several levels, and
        `num_codes`; `bits_per_image` of the codes; `compression_ratio`, relative to 8 bits per
        number; the `features` and the run's `seed`; and the hash of the model in `models`.

    Raises:
        VqbeamError: The run lacks a stage, or the features are not available.
    """
    config, models = run.load_config(), run.measured_models("vqvae")
    model = load_vqvae(run)
    prepared = run.require("prepare")
    obstacle = _frechet_obstacle(prepared, features)
    extract = None if obstacle else feature_extractor(run, features)
    sums = _Sums(model.layout, extract)
    with damaged_records(run.folder("prepare")):
        split = read_split(open_dataset(run.folder("prepare")), "validation")
        batches = split.map(lambda example: example["image"]).batch(config.encode.batch_size)
        with ProgressBar("evaluate", prepared["counts"]["validation"]) as bar:
            for originals, codes, copies in _passed_through(model, batches.as_numpy_iterator()):
                sums.add(originals, codes, copies)
                bar.update(len(originals))
    # The prepare stage measures the variance on [−1, 1], where errors are 127.5 times smaller.
    variance = prepared["statistics"]["variance"] * 127.5**2
    measures = {
        **sums.measures(config.image_shape, variance),
        "frechet_left_out": obstacle,
        "features": features,
        "seed": config.seed,
        "models": models,
    }
    run.evaluation.mkdir(parents=True, exist_ok=True)
    write_json(run.evaluation / "vqvae.json", measures)
    return measures


def _frechet_obstacle(prepared: dict, features: str) -> str | None:
    """Returns why the Fréchet distance cannot be measured, or None if it can."""
    if features == "classifier" and label_obstacle(prepared):
        return f"{label_obstacle(prepared)}; --features inception needs none"
    if prepared["counts"]["validation"] < 2:
        return "a single image has no covariance; hold out more"
    return None


def _passed_through(model: VQVAE, batches: Iterable[np.ndarray]):
    """Yields uint8 images [B, H, W, C], their codes int32 [B, *shape] and their reconstructions."""
    encode, decode = compiled_encoder(model), compiled_decoder(model)
    for images in batches:
        codes = encode(images)
        yield images, *map(keras.ops.convert_to_numpy, (codes, decode(codes)))


class _Sums:
    """The sums of one pass over images and their reconstructions.

    Args:
        layout: The layout of the codes.
        extract: Function from images to features, or None to omit the Fréchet distance.
    """

    def __init__(self, layout: CodeLayout, extract: Extract | None):
        self.layout = layout
        self.extract = extract
        self.images = 0
        self.squared_error = self.ssim = 0.0
        self.code_counts = np.zeros((layout.levels, layout.num_codes), np.int64)
        self.moments = (Moments(), Moments())

    def add(self, originals: np.ndarray, codes: np.ndarray, copies: np.ndarray) -> None:
        """Adds uint8 images [B, H, W, C], their codes [B, *layout.shape] and reconstructions."""
        self.images += len(originals)
        errors = originals.astype(np.float64) - copies
        self.squared_error += np.square(errors).sum()
        self.ssim += ssim(originals, copies).sum(dtype=np.float64)
        self.code_counts += count_codes(codes, self.layout)
        if self.extract:
            for moments, images in zip(self.moments, (originals, copies), strict=True):
                moments.add(self.extract(images))

    def measures(self, image_shape: tuple[int, int, int], variance: float) -> dict:
        """Returns the metrics, given the variance of the training pixels in [0, 255]."""
        mse = float(self.squared_error / self.images / np.prod(image_shape))
        bits = bits_per_image(self.layout.length, self.layout.num_codes)
        return {
            "images": self.images,
            "mse": mse,
            "nmse": nmse(mse, variance),
            "psnr": psnr(mse),
            "ssim": float(self.ssim / self.images),
            **self._frechet(),
            "perplexity": by_level([perplexity(counts) for counts in self.code_counts]),
            "codes_used": by_level([int((counts > 0).sum()) for counts in self.code_counts]),
            "num_codes": self.layout.num_codes,
            "bits_per_image": bits,
            "compression_ratio": compression_ratio(image_shape, bits),
        }

    def _frechet(self) -> dict:
        if not self.extract:
            return {"frechet": None, "feature_dim": None}
        originals, copies = (moments.gaussian() for moments in self.moments)
        return {
            "frechet": frechet_distance(originals, copies),
            "feature_dim": len(originals.mean),
        }


def reconstruct(run_dir: str, output: str, num: int = 16) -> None:
    """Writes a figure of the first `num` validation images above their reconstructions.

    Raises:
        VqbeamError: The run has no trained VQ-VAE.
    """
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
