import shutil

import numpy as np
import pytest
from broken_off import broken_off
from test_prior_training import SETTINGS, encoded_run

from vqbeam.configs import VqbeamError, override
from vqbeam.prior.training import build_prior, train_prior
from vqbeam.vqvae.fitting.fit import load_model
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import MODEL_FILE, load_vqvae, train_vqvae

pytestmark = pytest.mark.slow

# Nothing moves: the weights after training are those that it has started from.
STILL = dict(vqvae__learning_rate=0.0, vqvae__codebook_update="gradient", vqvae__restart_below=0.0)


def weights(run, stage="train-vqvae"):
    return [np.asarray(w) for w in load_model(run.folder(stage) / MODEL_FILE).weights]


def pinned(run, stage):
    return f"{run.root}@{run.result_hash(stage)[:16]}"


@pytest.fixture(scope="module")
def parent(prepared_run, tiny_config):
    """A run with a trained stage 1, of images without labels, one of which is held out."""
    changes = {**STILL, "vqvae__learning_rate": 0.01, "vqvae__steps": 2}
    run, _ = prepared_run(tiny_config(**changes), labels=(), validation=1)
    train_vqvae(str(run.root))
    return run


def test_a_run_without_labels_of_which_one_image_is_held_out(parent):
    manifest = parent.manifest("train-vqvae")
    assert len(manifest["history"]) == 1 and "init_from" not in manifest
    assert load_vqvae(parent).quantizer.update == "gradient"


def child_of(parent, prepared_run, tiny_config, **changes):
    init_from = pinned(parent, "train-vqvae")
    return prepared_run(tiny_config(**{**STILL, "vqvae__init_from": init_from, **changes}))[0]


def test_weights_are_those_of_the_parent_on_images_of_another_size(
    parent, prepared_run, tiny_config
):
    sizes = dict(data__height=16, data__width=16, seed=7, vqvae__steps=2)
    child = child_of(parent, prepared_run, tiny_config, **sizes, vqvae__codebook_init="data")
    manifest = train_vqvae(str(child.root))
    same = 0
    for theirs, ours in zip(weights(parent), weights(child), strict=True):
        if theirs.ndim > 1:  # usage counts the codes of this training, too
            np.testing.assert_array_equal(ours, theirs)
            same += 1
    assert same > 10
    assert manifest["init_from"] == parent.result_hash("train-vqvae")[:16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vqvae__width=16), r"\(vqvae.width: 8 → 16\): .*kernel \[4, 4, 1, 4\] → \[4, 4, 1, 8"),
        (dict(vqvae__num_codes=16), r"num_codes: 12 → 16\): \S*codebook \[12, 4\] → \[16, 4\]"),
        (dict(vqvae__codebook_update="ema"), r"\(vqvae.codebook_update: gradient → ema\): "),
    ],
)
def test_other_shapes_are_refused_by_name(parent, prepared_run, tiny_config, changes, message):
    child = child_of(parent, prepared_run, tiny_config, **changes)
    with pytest.raises(VqbeamError, match=f"train-vqvae model of .* does not fit .*{message}") as e:
        train_vqvae(str(child.root))
    assert "\n" not in str(e.value) and str(e.value).endswith("leave out --init-from")


def test_goes_on_exactly_without_the_parent(parent, prepared_run, tiny_config, tmp_path):
    moved = dict(vqvae__learning_rate=0.01, vqvae__steps=4)
    whole = child_of(parent, prepared_run, tiny_config, **moved)
    train_vqvae(str(whole.root))
    copy = RunFolder(shutil.copytree(parent.root, tmp_path / "parent"))
    child = child_of(copy, prepared_run, tiny_config, **moved)
    with broken_off(3, VQVAE):
        train_vqvae(str(child.root))
    copy.root.rmtree()
    train_vqvae(str(child.root))
    for name in ("history", "measures"):
        assert child.manifest("train-vqvae")[name] == whole.manifest("train-vqvae")[name]
    for one, other in zip(weights(child), weights(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_parent_that_was_trained_again(parent, prepared_run, tiny_config):
    wrong = f"{parent.root}@{'0' * 16}"
    child = child_of(parent, prepared_run, tiny_config, vqvae__init_from=wrong)
    with pytest.raises(VqbeamError, match=r"no longer holds the model .*not 0{16}\); start a new"):
        train_vqvae(str(child.root))


@pytest.fixture(scope="module")
def prior_config(tiny_config):
    still = {"prior.dropout": 0.0, "prior.early_stopping": 0, "prior.steps": 2}
    return override(tiny_config(vqvae__num_codes=9), SETTINGS | still)


@pytest.fixture(scope="module")
def prior_parent(tmp_path_factory, prior_config):
    run, _ = encoded_run(tmp_path_factory.mktemp("parent") / "run", prior_config)
    train_prior(str(run.root))
    return run


def still_prior(parent, config, **changes):
    still = {"prior.learning_rate": 0.0, "prior.init_from": pinned(parent, "train-prior")}
    return override(config, still | {k.replace("__", "."): v for k, v in changes.items()})


def embeddings_of(run):
    return np.asarray(load_model(run.folder("train-prior") / MODEL_FILE).label_embedding.embeddings)


def test_embeddings_go_by_the_names_of_classes(prior_parent, prior_config, tmp_path):
    config = still_prior(prior_parent, prior_config, seed=5)
    child, _ = encoded_run(tmp_path / "run", config, labels=("c", "d", "b", "e"))
    manifest = train_prior(str(child.root))
    assert manifest["init_from"] == prior_parent.result_hash("train-prior")[:16]
    theirs, ours = embeddings_of(prior_parent), embeddings_of(child)
    fresh = build_prior(config, Labels(("c", "d", "b", "e"))).label_embedding.embeddings
    a, b, c, none = theirs
    np.testing.assert_array_equal(ours, [c, fresh[1], b, fresh[3], none])
    models = [load_model(run.folder("train-prior") / MODEL_FILE) for run in (prior_parent, child)]
    others = [
        [np.asarray(w) for w in model.weights if w is not model.label_embedding.embeddings]
        for model in models
    ]
    assert len(others[0]) > 8
    for one, other in zip(*others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_priors_that_do_not_fit(prior_parent, prior_config, tmp_path):
    for number, (changes, message) in enumerate(
        (
            (dict(prior__layers=3), r"\(prior.layers: 1 → 3\): .* none → \[16, 16\]"),
            (dict(prior__heads=4), r"does not fit \(prior.heads: 2 → 4\); give the settings"),
            (dict(data__height=16), r"\(data.height: 8 → 16\): .* \[4, 16\] → \[8, 16\]"),
        )
    ):
        config = still_prior(prior_parent, prior_config, **changes)
        child, _ = encoded_run(tmp_path / str(number), config)
        with pytest.raises(VqbeamError, match=message):
            train_prior(str(child.root))
    config = still_prior(prior_parent, prior_config)
    child, _ = encoded_run(tmp_path / "attributes", config, kind="attributes")
    with pytest.raises(VqbeamError, match="has classes, and this run attributes; leave out"):
        train_prior(str(child.root))


LONGER = dict(vqvae__schedule="constant", vqvae__weight_ema=0.7, vqvae__restart_below=0.3)


def test_a_finished_model_goes_on_as_if_it_had_not_ended(prepared_run, tiny_config):
    config = tiny_config(**LONGER, vqvae__steps=4)
    whole, _ = prepared_run(config)
    train_vqvae(str(whole.root))
    run, _ = prepared_run(tiny_config(**LONGER, vqvae__steps=2))
    train_vqvae(str(run.root))
    with pytest.raises(VqbeamError, match="a different config .vqvae.steps: 2 → 4.; choose"):
        run.start(config)
    run.start(config, extend=True)
    # Beginning anew would come to the same, and take longer.
    assert not run.is_done("train-vqvae") and run.has_begun("train-vqvae")
    with broken_off(3, VQVAE):
        train_vqvae(str(run.root))
    run.start(config, extend=True)  # the same command again
    train_vqvae(str(run.root))
    run.start(config, extend=True)
    assert run.is_done("train-vqvae")
    for name in ("history", "measures"):
        assert run.manifest("train-vqvae")[name] == whole.manifest("train-vqvae")[name]
    for one, other in zip(weights(run), weights(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def trained(prepared_run, tiny_config):
    """Makes a run whose stage 1 is done after four steps; its checkpoint is a name alone."""

    def make(**changes):
        run, _ = prepared_run(tiny_config(vqvae__steps=4, **changes))
        run.begin("train-vqvae")
        folder = run.folder("train-vqvae") / "checkpoints" / run.fingerprint("train-vqvae")
        folder.mkdir(parents=True)
        (folder / "step-00000004.weights.h5").write_text("")
        run.finish("train-vqvae", [])
        return run

    return make


def test_what_cannot_be_extended(trained, tiny_config):
    run = trained(vqvae__steps_per_epoch=6)
    message = "vqvae.steps was 4, .* an epoch of 6 steps; add --vqvae.steps-per-epoch 4"
    with pytest.raises(VqbeamError, match=message):
        run.start(tiny_config(vqvae__steps=12, vqvae__steps_per_epoch=6), extend=True)
    with pytest.raises(VqbeamError, match="a different config .vqvae.steps: 4 → 2.; choose"):
        run.start(tiny_config(vqvae__steps=2, vqvae__steps_per_epoch=6), extend=True)
    changed = tiny_config(vqvae__steps=8, vqvae__steps_per_epoch=4, vqvae__learning_rate=1.0)
    with pytest.raises(VqbeamError, match="a different config .*learning_rate"):
        run.start(changed, extend=True)
    (run.folder("train-vqvae") / "checkpoints").rmtree()
    longer = tiny_config(vqvae__steps=8, vqvae__steps_per_epoch=4)
    with pytest.raises(VqbeamError, match="no checkpoint to go on from; .* and --init-from"):
        run.start(longer, extend=True)
    assert run.is_done("train-vqvae")


def test_a_model_whose_last_epoch_was_shorter(trained, tiny_config):
    run = trained(vqvae__steps_per_epoch=3)
    with pytest.raises(VqbeamError, match="no multiple of an epoch of 3 steps; .*-epoch 4"):
        run.start(tiny_config(vqvae__steps=9, vqvae__steps_per_epoch=3), extend=True)
    # With epochs of another length it goes on; test_fitting.py counts them.
    run.start(tiny_config(vqvae__steps=9, vqvae__steps_per_epoch=4), extend=True)
    assert not run.is_done("train-vqvae") and run.has_begun("train-vqvae")


def test_an_extension_that_was_killed_while_it_was_set_up(trained, tiny_config, monkeypatch):
    run = trained()
    longer = tiny_config(vqvae__steps=8)
    # After the checkpoints were moved.
    run._take_along("train-vqvae", longer)
    assert run.is_done("train-vqvae")
    run.start(longer, extend=True)
    assert not run.is_done("train-vqvae") and run.has_begun("train-vqvae")
    # After the config was stored.
    run.finish("train-vqvae", [])
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_reopen", lambda self: None)
        run.start(tiny_config(vqvae__steps=12), extend=True)
    assert run.is_done("train-vqvae")
    run.start(tiny_config(vqvae__steps=12), extend=True)
    assert not run.is_done("train-vqvae") and run.has_begun("train-vqvae")


def test_early_stopping_is_not_extended(tmp_path, tiny_config):
    run = RunFolder(tmp_path / "run")
    run.start(tiny_config(prior__early_stopping=2, prior__steps=500))
    with pytest.raises(VqbeamError, match="prior.early_stopping is 2, and --extend is for a fixed"):
        run.start(tiny_config(prior__early_stopping=2, prior__steps=1000), extend=True)
