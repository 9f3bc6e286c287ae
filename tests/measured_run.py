"""A run that can be measured at once: its models are not trained, and its features are stubs."""

import keras
import numpy as np

from vqbeam.pipelines.evaluation.features import build_classifier
from vqbeam.prior.training import STAGE as TRAIN_PRIOR
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.fit import save_model
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.training import MODEL_FILE
from vqbeam.vqvae.training import STAGE as TRAIN_VQVAE


def add_models(run, pixels, labels=("a", "b"), dtype="float32", kind="classes"):
    """Gives a prepared run a VQ-VAE and a prior, which use more than one code."""
    config = run.load_config()
    vqvae = build_model(config, data_variance=1.0)
    vqvae.initialize_codebook(scale_images(pixels["train"]), "data", seed=0)
    keras.utils.set_random_seed(2)
    sizes = {"layers": 1, "width": 16, "heads": 2}
    prior = CodePrior(code_layout(config), len(labels), conditioning=kind, dtype=dtype, **sizes)
    for weight in prior.trainable_weights:
        weight.assign(weight + 0.5 * keras.random.normal(weight.shape))
    facts = {"measures": {"nats_per_code": 1.5, "bits_per_dim": 0.25}}
    facts |= {"label_names": list(labels), "label_kind": kind}
    for stage, model, more in ((TRAIN_VQVAE, vqvae, {}), (TRAIN_PRIOR, prior, facts)):
        run.begin(stage)
        save_model(model, run.folder(stage) / MODEL_FILE)
        run.finish(stage, [run.folder(stage) / MODEL_FILE], **more)
    return vqvae, prior


def stub_features(run, name):
    """Means over the quarters of an image, as its features."""
    return lambda images: np.stack(
        [images[:, i::2, j::2].mean(axis=(1, 2, 3)) for i in (0, 1) for j in (0, 1)], axis=1
    ).astype("float32")


def stub_classifier(run):
    """A classifier that has learned nothing."""
    keras.utils.set_random_seed(0)
    return build_classifier(run.load_config().image_shape, 2)
