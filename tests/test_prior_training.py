import io
import itertools
import math

import keras
import numpy as np
import pytest
from broken_off import Killed, broken_off, kill
from event_files import events
from measured_run import add_models
from PIL import Image
from shard_files import write_shard

from vqbeam.configs import PriorConfig, VqbeamError, override
from vqbeam.prior import training
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.training import (
    STAGE,
    build_optimizer,
    build_prior,
    evaluate,
    load_prior,
    train_prior,
)
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.figures import label_figure
from vqbeam.vqvae.fitting.fit import save_model
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage import records
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import MODEL_FILE, load_vqvae

pytestmark = pytest.mark.slow

LABELS = Labels(("a", "b", "c"))
COUNTS = {"train": 30, "validation": 11}
SETTINGS = {
    "prior.layers": 1,
    "prior.width": 16,
    "prior.heads": 2,
    "prior.dropout": 0.2,
    "prior.batch_size": 4,
    "prior.steps": 8,
    "prior.steps_per_epoch": 2,
    "prior.warmup_steps": 2,
    "prior.learning_rate": 0.01,
    "prior.pictures": 0,
    "prior.early_stopping": 9,
}


def encoded_run(path, config, labels=("a", "b", "c"), kind="classes"):
    """A run with finished stages up to `encode`; returns it with its codes and labels by split.

    An image has one class, or of attributes the one of this number and the first.
    """
    run = RunFolder(path)
    run.start(config)
    for stage in ("prepare", "train-vqvae", "encode"):
        run.begin(stage)
        if stage != "encode":
            run.finish(stage, [])
    layout = code_layout(config)
    features = records.code_features(layout, Labels(tuple(labels), kind))
    numbers = np.random.default_rng(0)
    splits, files, content = {}, [], {}
    for split, count in COUNTS.items():
        kinds = np.arange(count) % len(labels) if labels else np.full(count, -1)
        codes = numbers.integers(0, layout.num_codes, (count, *layout.shape)).astype("uint16")
        # One code follows from the class, so that there is something to learn.
        codes.reshape(count, -1)[:, 0] = kinds + 1
        given, name = kinds, "label"
        if kind == "attributes":
            given, name = np.eye(len(labels), dtype="uint8")[kinds], "attributes"
            given[:, 0] = 1
        content[split] = {"codes": codes.astype("int32"), "labels": given.astype("int32")}
        examples = [
            {"codes": of_image, "key": str(i)} | ({name: label} if labels else {})
            for i, (of_image, label) in enumerate(zip(codes, given, strict=True))
        ]
        file = run.folder("encode") / records.Shard("codes", split, 0, 1).filename
        size = write_shard(file, [records.serialize(e) for e in examples])
        splits[split] = [(count, size)]
        files.append(file)
    files += records.write_metadata(
        run.folder("encode"),
        features,
        splits,
        name="codes",
        version=records.CODES_VERSION,
        description="Noise.",
    )
    run.finish("encode", files, counts=COUNTS, label_names=list(labels), label_kind=kind)
    return run, content


@pytest.fixture(scope="module")
def config(tiny_config):
    return override(tiny_config(vqvae__num_codes=9), SETTINGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config):
    run, content = encoded_run(tmp_path_factory.mktemp("trained") / "run", config)
    return run, content, train_prior(str(run.root))


def array(tensor):
    return np.asarray(tensor).copy()


def test_writes_model_logs_and_manifest(trained, config):
    run, _, manifest = trained
    assert run.is_done(STAGE) and run.manifest(STAGE) == manifest
    assert set(manifest["outputs"]) == {MODEL_FILE}
    assert manifest["label_names"] == ["a", "b", "c"]
    assert len(manifest["history"]) == 4 and manifest["seconds"] > 0
    names = {"loss", "val_loss", "bits_per_dim", "val_bits_per_dim"}
    assert all(set(epoch) == names for epoch in manifest["history"])
    for prefix in ("", "val_"):
        shown = events(run.folder(STAGE) / "logs" / ("validation" if prefix else "train"))
        for index, epoch in enumerate(manifest["history"]):
            # Four codes stand for 8·8·1 numbers.
            bits = epoch[f"{prefix}loss"] * 4 / math.log(2) / 64
            assert epoch[f"{prefix}bits_per_dim"] == pytest.approx(bits, rel=1e-6)
            assert shown["epoch_bits_per_dim"][index] == pytest.approx(bits, rel=1e-5)
    best = min(manifest["history"], key=lambda epoch: epoch["val_loss"])
    assert manifest["measures"]["nats_per_code"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert list((run.folder(STAGE) / "logs").glob("*"))
    model = load_prior(run)
    assert model.layout == code_layout(config) and model.num_labels == 3
    assert manifest["parameters"] == model.count_params()


def assert_measures(trained, length):
    """Recomputes the measures of a run, each of whose images has so many codes."""
    run, content, manifest = trained
    inputs = content["validation"]
    logits = array(load_prior(run)(inputs)).astype("float64")
    assert logits.shape == (11, length, 9)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    codes = inputs["codes"].reshape(11, length)
    # Eleven images in batches of four: the mean is over codes, not over batches.
    nats = -np.log(np.take_along_axis(chances, codes[..., None], -1)).mean()
    assert manifest["measures"]["nats_per_code"] == pytest.approx(nats, rel=1e-4)
    # The codes stand for 8·8·1 numbers.
    bits = nats * length / math.log(2) / 64
    assert manifest["measures"]["bits_per_dim"] == pytest.approx(bits, rel=1e-4)


def test_measures_in_numpy(trained):
    assert_measures(trained, length=4)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"vqvae.quantizer": "residual", "vqvae.depth": 3}, (2, 2, 3)),
        ({"vqvae.grids": 2}, (1 + 4,)),
    ],
)
def test_codes_of_several_levels(tmp_path, config, settings, shape):
    settings = settings | {"prior.steps": 2}
    run, content = encoded_run(tmp_path / "run", override(config, settings))
    assert content["train"]["codes"].shape == (30, *shape)
    manifest = train_prior(str(run.root))
    assert_measures((run, content, manifest), length=math.prod(shape))
    kernel = array(load_prior(run).head.kernel.value)
    assert np.all(np.abs(kernel).max((1, 2)) > 0)  # the head of every level has learned


def test_an_untrained_prior_knows_nothing(config):
    model = build_prior(config, LABELS)
    model.compile("sgd")
    inputs = {"codes": np.zeros((2, 2, 2), "int32"), "labels": np.zeros(2, "int32")}

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return (inputs,)

    measures = evaluate(model, Batches(), config)
    assert measures["nats_per_code"] == pytest.approx(math.log(9), rel=1e-5)


def test_a_finished_stage_is_left_alone(trained):
    run, _, manifest = trained
    before = (run.folder(STAGE) / MODEL_FILE).stat().mtime
    assert train_prior(str(run.root)) == manifest
    assert (run.folder(STAGE) / MODEL_FILE).stat().mtime == before


# Every option that keeps state of its own, at once; with such a rate it soon gets worse.
STATEFUL = {
    "prior.steps": 16,
    "prior.warmup_steps": 3,
    "prior.schedule": "constant",
    "prior.learning_rate": 0.3,
    "prior.weight_ema": 0.6,
    "prior.grad_accumulation": 2,
    "prior.early_stopping": 1,
    "prior.pictures": 4,
}


def stateful_run(path, config):
    """A run with codes and a VQ-VAE that has learned nothing."""
    run, _ = encoded_run(path, override(config, STATEFUL))
    untrained_vqvae(run)
    return run


def untrained_vqvae(run):
    """Gives a run the VQ-VAE that pictures are decoded with."""
    model = build_model(run.load_config(), data_variance=1.0)
    save_model(model, run.folder("train-vqvae") / MODEL_FILE)


@pytest.mark.backend
def test_all_state_goes_on_where_training_was_broken_off(tmp_path, config, monkeypatch):
    run, other = (stateful_run(tmp_path / name, config) for name in ("run", "other"))
    manifest = train_prior(str(run.root))
    epochs = len(manifest["history"])
    losses = [epoch["val_loss"] for epoch in manifest["history"]]
    best = losses.index(min(losses))
    assert 1 < epochs == best + 2 < 8
    assert manifest["measures"]["nats_per_code"] == pytest.approx(losses[best], rel=1e-5)
    for step in (1, 2 * best + 3):  # in the middle of the first and of the last epoch
        with broken_off(step):
            train_prior(str(other.root))
    with monkeypatch.context() as patch:
        # And once more after the last epoch, before the model is written.
        patch.setattr("vqbeam.prior.training.save_model", kill)
        with pytest.raises(Killed):
            train_prior(str(other.root))
    assert other.manifest(STAGE) is None
    again = train_prior(str(other.root))
    assert again["history"] == manifest["history"]
    assert again["measures"] == manifest["measures"]
    for one, two in zip(load_prior(run).weights, load_prior(other).weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two), err_msg=one.path)
    assert_pictures(run, epochs, best)


def assert_pictures(run, epochs, best):
    """The picture of the best epoch is what its weights draw, which are those of the result."""
    shown = events(run.folder(STAGE) / "logs" / "images")["samples"]
    assert sorted(shown) == list(range(epochs))
    labels = np.array([0, 1, 2, 0])
    codes = Sampler(load_prior(run), 4)(labels, run.load_config().seed)
    figure = label_figure(array(load_vqvae(run).decode(codes)), ["abc"[label] for label in labels])
    png = Image.open(io.BytesIO(shown[best][2]))
    # A compiled decoder may round a pixel in another way.
    assert np.abs(np.asarray(png).astype(int) - np.asarray(figure)).max() <= 1


def batches(run, config, model, count, first_step=0):
    codes = run.manifest("encode")
    inputs = training._training(run, config, codes, model).inputs(first_step)
    taken = itertools.islice(inputs, count)
    return [{name: array(values) for name, values in batch.items()} for batch in taken]


def test_a_share_of_the_labels_is_dropped(trained, config):
    run, content, _ = trained
    config = override(config, {"prior.label_dropout": 0.25})
    model = build_prior(config, LABELS)
    drawn = batches(run, config, model, 300)
    labels = np.concatenate([batch["labels"] for batch in drawn])
    dropped = labels == model.null_label
    # 1200 draws: five standard deviations.
    assert abs(dropped.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1200)
    # The code in the corner tells which label it was.
    corner = np.concatenate([batch["codes"] for batch in drawn])[:, 0, 0]
    np.testing.assert_array_equal(labels[~dropped], corner[~dropped] - 1)
    assert set(corner[dropped]) == {1, 2, 3}
    # Begun later on, the same are dropped.
    later = batches(run, config, model, 5, first_step=20)
    for one, two in zip(later, drawn[20:25], strict=True):
        np.testing.assert_array_equal(one["labels"], two["labels"])
        np.testing.assert_array_equal(one["codes"], two["codes"])


def test_no_label_is_dropped_at_zero_and_in_validation(trained, config):
    run, content, _ = trained
    config = override(config, {"prior.label_dropout": 0.0})
    model = build_prior(config, LABELS)
    labels = np.concatenate([batch["labels"] for batch in batches(run, config, model, 30)])
    assert set(labels) == {0, 1, 2}
    found = list(training._validation(run, config).as_numpy_iterator())
    assert [len(batch["labels"]) for batch in found] == [4, 4, 3]
    for name, expected in content["validation"].items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in found]), expected)


def test_without_classes(tmp_path, config):
    run, _ = encoded_run(tmp_path / "run", override(config, {"prior.steps": 1}), labels=())
    manifest = train_prior(str(run.root))
    assert manifest["label_names"] == [] and load_prior(run).num_labels == 0


def test_with_attributes(tmp_path, config):
    changes = {"prior.steps": 2, "prior.label_dropout": 0.5, "prior.pictures": 2}
    config = override(config, changes)
    run, content = encoded_run(tmp_path / "run", config, kind="attributes")
    untrained_vqvae(run)
    manifest = train_prior(str(run.root))
    assert list(events(run.folder(STAGE) / "logs" / "images")["samples"]) == [0]
    assert (manifest["label_names"], manifest["label_kind"]) == (["a", "b", "c"], "attributes")
    model = load_prior(run)
    assert (model.num_labels, model.conditioning) == (3, "attributes")
    assert_measures((run, content, manifest), length=4)
    drawn = batches(run, config, model, 100)
    labels = np.concatenate([batch["labels"] for batch in drawn])
    dropped = (labels == -1).all(axis=1)
    # All of them or none.
    assert (labels[~dropped] >= 0).all() and labels.shape == (400, 3)
    assert abs(dropped.mean() - 0.5) < 5 * math.sqrt(0.25 / 400)
    corner = np.concatenate([batch["codes"] for batch in drawn])[~dropped, 0, 0]
    np.testing.assert_array_equal(
        labels[~dropped][:, 1:].argmax(1)[corner > 1] + 2, corner[corner > 1]
    )


def test_the_optimizer_is_as_the_settings_say():
    changed = dict(schedule="constant", warmup_steps=4, learning_rate=0.5, weight_decay=0.25)
    plain = build_optimizer(PriorConfig(steps=100, steps_per_epoch=100, clip_norm=0.0, **changed))
    assert plain.global_clipnorm is None and not plain.use_ema and plain.weight_decay == 0.25
    rates = [float(plain._learning_rate(step)) for step in (0, 2, 4, 99)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.5])
    other = build_optimizer(PriorConfig(clip_norm=0.1, weight_ema=0.9))
    assert (other.global_clipnorm, other.use_ema, other.ema_momentum) == (0.1, True, 0.9)


def test_the_options_of_the_blocks_reach_them(config):
    given = {"prior.qk_norm": "rms", "prior.branch_init": "zeros"}
    for changes, expected in (({}, False), (given, True)):
        (block,) = build_prior(override(config, changes), LABELS).blocks
        assert len(block.qk_norms) == 2 * expected and block.zero_init == expected


def test_needs_codes(tmp_path, config):
    run = RunFolder(tmp_path / "run")
    run.start(config)
    with pytest.raises(VqbeamError, match="no finished encode stage; run vqbeam encode"):
        train_prior(str(run.root))
    with pytest.raises(VqbeamError, match="no finished train-prior stage"):
        load_prior(run)


def test_a_prior_of_another_codebook(trained, config, monkeypatch):
    run, _, _ = trained
    other = override(config, {"vqvae.num_codes": 16})
    monkeypatch.setattr(RunFolder, "load_config", lambda self: other)
    with pytest.raises(
        VqbeamError, match="prior/model.keras has .*grid, K = 9, .* says .* K = 16;"
    ):
        load_prior(run)


def test_a_prior_draws_in_float32_however_it_was_trained(prepared_run, tiny_config):
    run, pixels = prepared_run(tiny_config())
    _, trained = add_models(run, pixels, dtype="mixed_bfloat16")
    loaded = load_prior(run)
    assert trained.blocks[0].compute_dtype == "bfloat16"
    assert loaded.compute_dtype == loaded.blocks[0].qkv.compute_dtype == "float32"
    for one, two in zip(trained.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two), err_msg=one.path)
