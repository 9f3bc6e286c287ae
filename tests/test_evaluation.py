import json
import math

import keras
import numpy as np
import pytest

import vqbeam.pipelines.evaluation.reconstructions as evaluation
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.evaluation.reconstructions import evaluate_vqvae
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.fit import save_model
from vqbeam.vqvae.metrics import perplexity, ssim
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.training import MODEL_FILE, STAGE


def stub_features(images):
    """Means over quarters of an image and the spread of the whole, as features float32 [B, 5]."""
    quarters = [images[:, i::2, j::2].mean(axis=(1, 2, 3)) for i in (0, 1) for j in (0, 1)]
    return np.stack([*quarters, images.std(axis=(1, 2, 3))], axis=1).astype("float32")


@pytest.fixture
def run_with_model(prepared_run, tiny_config, monkeypatch):
    """Makes a run with an untrained VQ-VAE; returns it, its pixels and the model."""
    monkeypatch.setattr(evaluation, "feature_extractor", lambda run, name: stub_features)

    def make(*, labels=("a", "b"), validation=10, **changes):
        config = tiny_config(**changes)
        run, pixels = prepared_run(config, labels=labels, validation=validation)
        run.begin(STAGE)
        model = build_model(config, data_variance=1.0)
        # Codes on the encoder's vectors, so that several of them are in use.
        model.initialize_codebook(scale_images(pixels["train"]), "data", seed=0)
        save_model(model, run.folder(STAGE) / MODEL_FILE)
        run.finish(STAGE, [run.folder(STAGE) / MODEL_FILE])
        return run, pixels, model

    return make


def frechet(first, second):
    """By singular values of the features themselves, and no covariance."""
    means = first.mean(axis=0), second.mean(axis=0)
    a, b = ((f - m) / math.sqrt(len(f) - 1) for f, m in zip((first, second), means, strict=True))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.square(means[0] - means[1]).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap


@pytest.mark.slow
def test_every_figure_in_numpy(run_with_model):
    run, pixels, model = run_with_model(seed=5)
    # Ten images in three batches, of 4, 4 and 2.
    found = evaluate_vqvae(run)
    images = pixels["validation"]
    codes = keras.ops.convert_to_numpy(model.encode(images))
    copies = keras.ops.convert_to_numpy(model.decode(codes))
    mse = np.square(images.astype("float64") - copies).mean()
    counts = np.bincount(codes.ravel(), minlength=12)
    assert (counts > 0).sum() > 1
    expected = {
        "images": 10,
        "mse": mse,
        "nmse": mse / np.var(pixels["train"].astype("float64")),
        "psnr": 10 * np.log10(255**2 / mse),
        "ssim": ssim(images, copies).mean(),
        "frechet": frechet(*(stub_features(i).astype("float64") for i in (images, copies))),
        "feature_dim": 5,
        "perplexity": perplexity(counts),
        "codes_used": (counts > 0).sum(),
        "num_codes": 12,
        "bits_per_image": 4 * np.log2(12),
        "compression_ratio": 64 * 8 / (4 * np.log2(12)),
        "seed": 5,
    }
    words = {name: found.pop(name) for name in ("features", "frechet_left_out", "models")}
    assert found == pytest.approx(expected, rel=1e-4)
    models = {"train-vqvae": run.result_hash("train-vqvae")}
    assert words == {"features": "classifier", "frechet_left_out": None, "models": models}


@pytest.mark.slow
def test_writes_what_it_returns(run_with_model):
    run, _, _ = run_with_model()
    found = evaluate_vqvae(run)
    assert json.loads((run.evaluation / "vqvae.json").read_text()) == found
    assert evaluate_vqvae(run) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"vqvae__quantizer": "residual", "vqvae__depth": 2}, [4, 4]),
        ({"vqvae__grids": 2}, [1, 4]),
    ],
)
def test_codebook_use_of_each_level(run_with_model, changes, lengths):
    run, pixels, model = run_with_model(**changes, encode__batch_size=16)
    found = evaluate_vqvae(run)
    codes = keras.ops.convert_to_numpy(model.encode(pixels["validation"])).reshape(10, -1)
    levels = [codes[:, model.layout.level == level] for level in (0, 1)]
    assert [part.shape[1] for part in levels] == lengths
    counts = [np.bincount(part.ravel(), minlength=12) for part in levels]
    assert found["perplexity"] == pytest.approx([perplexity(of_level) for of_level in counts])
    assert found["codes_used"] == [int((of_level > 0).sum()) for of_level in counts]
    assert found["bits_per_image"] == pytest.approx(sum(lengths) * np.log2(12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "features", "why"),
    [
        ({"labels": ()}, "classifier", "no classes for the classifier to learn; --features inc"),
        ({"labels": ("a",)}, "classifier", "no classes for the classifier to learn"),
        ({"validation": 1}, "inception", "a single image has no covariance; hold out more"),
    ],
)
def test_where_there_is_no_frechet_distance(run_with_model, changes, features, why):
    run, _, _ = run_with_model(**changes)
    found = evaluate_vqvae(run, features)
    assert found["frechet"] is None and found["feature_dim"] is None
    assert found["frechet_left_out"].startswith(why)
    assert found["features"] == features and found["mse"] > 0


@pytest.mark.slow
def test_inception_needs_no_classes(run_with_model):
    run, _, _ = run_with_model(labels=())
    found = evaluate_vqvae(run, "inception")
    assert found["frechet"] > 0 and found["frechet_left_out"] is None


@pytest.mark.slow
def test_one_pass_whatever_the_batches(run_with_model):
    # In another batch a pixel may round in another way.
    runs = (run_with_model(encode__batch_size=size)[0] for size in (3, 100))
    small, large = (list(evaluate_vqvae(run).items()) for run in runs)
    for one, two in zip(small, large, strict=True):
        assert one == two or one[1] == pytest.approx(two[1], rel=1e-4)


def test_needs_a_trained_model_and_images(prepared_run, run_with_model, tiny_config):
    untrained, _ = prepared_run(tiny_config())
    with pytest.raises(VqbeamError, match="no finished train-vqvae stage; run vqbeam train-vqvae"):
        evaluate_vqvae(untrained)
    run, _, _ = run_with_model()
    run.folder("prepare").rmtree()
    with pytest.raises(VqbeamError, match="no finished prepare stage; run vqbeam prepare"):
        evaluate_vqvae(run)
    assert not run.evaluation.exists()


@pytest.mark.slow
def test_a_damaged_record_is_named(run_with_model):
    run, _, _ = run_with_model()
    shard = next(run.folder("prepare").glob("images-validation.tfrecord-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(bytes(data))
    with pytest.raises(VqbeamError, match="a record in .*images-.* is damaged"):
        evaluate_vqvae(run)
    assert not (run.evaluation / "vqvae.json").exists()
