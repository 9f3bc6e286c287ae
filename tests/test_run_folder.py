import hashlib
import json

import pytest
from pipeline_fixtures import write_measures

from vqbeam.configs import VqbeamError, override, to_dict
from vqbeam.vqvae.storage import files
from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, RunFolder, _hash_of, checkpoint_files


@pytest.fixture
def run(tmp_path, tiny_config):
    run = RunFolder(tmp_path / "run")
    run.start(tiny_config())
    return run


def finish(run, stage, text="content", **facts):
    run.begin(stage)
    output = run.folder(stage) / "output.txt"
    output.write_text(text)
    return run.finish(stage, [output], **facts)


def finish_all(run):
    for stage in STAGES:
        finish(run, stage)


def test_stores_the_config(run, tiny_config):
    assert run.load_config() == tiny_config()
    run.start(tiny_config())  # again, as every later verb does
    assert RunFolder(str(run.root)).load_config() == tiny_config()


def test_refuses_another_config_and_names_the_fields(run, tiny_config):
    finish(run, "train-vqvae")
    other = tiny_config(vqvae__num_codes=16, seed=3)
    message = (
        r"run contains .*\((seed: 0 → 3; vqvae.num_codes: 12 → 16|.*16; seed: 0 → 3)\); choose"
    )
    with pytest.raises(VqbeamError, match=message):
        run.start(other)
    assert run.load_config() == tiny_config()


def test_settings_of_stages_with_nothing_to_lose_may_change(run, tiny_config):
    run.start(tiny_config(seed=3, data__max_failed=0.5))
    finish(run, "prepare")
    run.start(tiny_config(seed=3, data__max_failed=0.5, prior__layers=2))
    assert run.load_config().prior.layers == 2
    assert run.is_done("prepare")
    with pytest.raises(
        VqbeamError, match="a different config .data.max_failed: 0.5 → 0.01.; choose"
    ):
        run.start(tiny_config(seed=3, prior__layers=2))
    with pytest.raises(VqbeamError, match="a different config .seed: 3 → 0.; choose"):
        run.start(tiny_config(data__max_failed=0.5, prior__layers=2))


def test_a_checkpoint_is_something_to_lose(run, tiny_config):
    write_checkpoint(run, "train-vqvae", "step-00000001")
    run.start(tiny_config(prior__layers=2))
    with pytest.raises(VqbeamError, match="a different config .vqvae.num_codes: 12 → 16.; choose"):
        run.start(tiny_config(prior__layers=2, vqvae__num_codes=16))


def write_checkpoint(run, stage, name):
    checkpoint = run.folder(stage) / "checkpoints" / "f" / f"{name}.weights.h5"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text("")


def test_the_length_of_an_epoch_may_change_where_the_result_does_not_depend_on_it(run, tiny_config):
    write_checkpoint(run, "train-vqvae", "step-00000001")
    write_checkpoint(run, "train-prior", "step-00000001")
    prints = [run.fingerprint(stage) for stage in ("train-vqvae", "train-prior")]
    lengths = dict(vqvae__steps_per_epoch=4, prior__steps_per_epoch=250)
    run.start(tiny_config(**lengths))
    assert prints == [run.fingerprint(stage) for stage in ("train-vqvae", "train-prior")]
    finish_all(run)
    run.start(tiny_config())
    assert run.done(STAGES) == set(STAGES)


def test_where_metrics_are_written_may_change_at_any_time(run, tiny_config):
    prints = [run.fingerprint(stage) for stage in STAGES]
    write_checkpoint(run, "train-vqvae", "step-00000001")
    run.start(override(tiny_config(), {"log": "csv"}))
    assert run.load_config().log == "csv"
    assert prints == [run.fingerprint(stage) for stage in STAGES]
    finish_all(run)
    run.start(override(tiny_config(), {"log": "wandb:letters"}))
    assert run.load_config().log_to == {"wandb": "letters"}
    assert run.done(STAGES) == set(STAGES)


def test_the_length_of_an_epoch_may_not_change_where_epochs_are_counted(tmp_path, tiny_config):
    # By early stopping.
    run = RunFolder(tmp_path / "stopping")
    run.start(tiny_config(prior__early_stopping=2))
    before = run.fingerprint("train-prior")
    changed = tiny_config(prior__early_stopping=2, prior__steps_per_epoch=250)
    run.start(changed)
    assert run.fingerprint("train-prior") != before
    write_checkpoint(run, "train-prior", "step-00000250")
    with pytest.raises(VqbeamError, match="a different config .prior.steps_per_epoch: 250 → 500.;"):
        run.start(tiny_config(prior__early_stopping=2))
    # By the names of checkpoints of earlier versions.
    run = RunFolder(tmp_path / "earlier")
    run.start(tiny_config())
    write_checkpoint(run, "train-vqvae", "epoch-00003")
    assert run.trained_steps("train-vqvae") == 6
    with pytest.raises(VqbeamError, match="a different config .vqvae.steps_per_epoch: 2 → 4.;"):
        run.start(tiny_config(vqvae__steps_per_epoch=4))


def test_the_fingerprint_of_earlier_versions_is_known(run):
    finish(run, "prepare")
    settings = to_dict(run.load_config())["vqvae"]
    assert settings.pop("init_from") is None
    own = ["train-vqvae", [0, settings], {"prepare": run.result_hash("prepare")}]
    earlier = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
    assert run.fingerprints("train-vqvae") == (run.fingerprint("train-vqvae"), earlier)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(VqbeamError, match="is not a run folder: it has no config.json"):
        RunFolder(tmp_path).load_config()


def test_a_config_changed_by_hand(run):
    path = run.root / "config.json"
    values = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(VqbeamError, match="config.json is not valid JSON"):
        run.load_config()
    values["vqvae"]["code_dim"] = 0
    path.write_text(json.dumps(values))
    with pytest.raises(VqbeamError, match="config.json: vqvae.code_dim is 0; it must be at least"):
        run.load_config()


@pytest.mark.parametrize("change", ['"train": 6', '"seed": 1, "train": 5', None])
def test_a_manifest_changed_by_hand(run, change):
    finish(run, "prepare", counts={"train": 5})
    path = run.folder("prepare") / MANIFEST
    path.write_text(path.read_text().replace('"train": 5', change) if change else "[]")
    for look in (run.manifest, run.is_done, run.require, run.result_hash):
        with pytest.raises(VqbeamError, match="manifest.json is not as vqbeam writes it"):
            look("prepare")
    path.unlink()
    assert not run.is_done("prepare")


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"outputs": None},
        {"outputs": 7},
        {"seconds": "long"},
        {"made_from": []},
        {"counts": [5]},
        {"history": {}},
        {"label_names": "abc"},
    ],
)
def test_a_manifest_of_another_kind_with_a_right_hash(run, change):
    manifest = finish(run, "prepare", counts={"train": 5}) | change
    path = run.folder("prepare") / MANIFEST
    path.write_text(json.dumps(manifest | {"sha256": _hash_of(manifest)}))
    for look in (run.manifest, run.is_done, run.require, run.result_hash):
        with pytest.raises(VqbeamError, match="manifest.json is not as vqbeam writes it"):
            look("prepare")


def test_an_entry_that_a_manifest_lacks_is_named(run):
    finish(run, "prepare")
    with pytest.raises(VqbeamError, match="images/manifest.json has no entry 'counts'; restore"):
        _ = run.manifest("prepare")["counts"]


@pytest.mark.parametrize("text", ["[]", "7", '{"data": []}', "null", '{"vqvae": 7, "data": {}}'])
def test_a_config_of_another_kind(run, text):
    path = run.root / "config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps(values | found) if isinstance(found := json.loads(text), dict) else text
    )
    with pytest.raises(VqbeamError, match="config.json"):
        run.load_config()
    path.write_text(json.dumps(values | {"name": 7}))
    with pytest.raises(VqbeamError, match="config.json: name is 7; give a string"):
        run.load_config()


def test_manifest_holds_outputs_and_facts(run):
    manifest = finish(run, "prepare", text="12345", counts={"train": 5})
    assert manifest == run.manifest("prepare") == run.require("prepare")
    assert manifest["outputs"] == {"output.txt": 5}
    assert manifest["counts"] == {"train": 5} and manifest["stage"] == "prepare"
    assert manifest["inputs"] == {}


def test_a_stage_is_done_when_its_manifest_is_there(run):
    for stage in STAGES:
        assert not run.is_done(stage) and run.manifest(stage) is None
        run.begin(stage)
        (run.folder(stage) / "output.txt").write_text("whatever files lie there")
        assert not run.is_done(stage)
        finish(run, stage)
        assert run.is_done(stage)


def test_begin_declares_a_stage_not_done(run):
    finish_all(run)
    run.begin("encode")
    assert not run.is_done("encode") and run.manifest("encode") is None
    assert run.is_done("train-vqvae")


@pytest.mark.parametrize(
    ("stage", "stale"),
    [
        ("prepare", ["train-vqvae", "encode", "train-prior", "sample"]),
        ("train-vqvae", ["encode", "train-prior", "sample"]),
        ("encode", ["train-prior", "sample"]),
        ("train-prior", ["sample"]),
    ],
)
def test_what_read_an_older_result_is_not_done(run, stage, stale):
    finish_all(run)
    finish(run, stage, text="another content")
    assert [name for name in STAGES if not run.is_done(name)] == stale
    # With the same bytes again, nothing is stale.
    finish(run, stage)
    assert all(run.is_done(name) for name in STAGES)


def test_measures_are_of_the_present_models(run):
    finish_all(run)
    assert run.measures("prior") is None
    written = write_measures(run, "prior", images=9), write_measures(run, "vqvae", psnr=1.0)
    assert (run.measures("prior"), run.measures("vqvae")) == written
    finish(run, "train-prior", text="another model")
    assert run.measures("prior") is None and run.measures("vqvae") == written[1]
    finish(run, "train-vqvae", text="another model")
    assert run.measures("vqvae") is None
    # Earlier versions did not store the hashes.
    (run.evaluation / "vqvae.json").write_text('{"psnr": 2.0}')
    assert run.measures("vqvae") == {"psnr": 2.0}


def test_what_read_a_lost_result_is_not_done(run):
    finish_all(run)
    (run.folder("encode") / MANIFEST).unlink()
    assert not run.is_done("train-prior") and run.is_done("train-vqvae")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_output_is_named(run, damage):
    finish_all(run)
    output = run.folder("train-vqvae") / "output.txt"
    if damage == "missing":
        output.unlink()
        state = "is missing"
    else:
        output.write_text("conte")
        state = "has 5 bytes instead of 7"
    again = "run vqbeam train-vqvae PRESET --run-dir .*run again"
    message = f"vqvae/output.txt {state}; delete .*vqvae/manifest.json and {again}"
    for check in (run.is_done, run.require):
        with pytest.raises(VqbeamError, match=f"{message}$"):
            check("train-vqvae")
    write_checkpoint(run, "train-vqvae", "step-00000004")
    with pytest.raises(VqbeamError, match=f"{message}, which restores it from its last checkpoint"):
        run.require("train-vqvae")
    assert run.is_done("prepare")


def test_a_dataset_that_lacks_a_file_is_not_done(run):
    run.begin("prepare")
    outputs = [run.folder("prepare") / name for name in ("a", "b")]
    for output in outputs:
        output.write_text("content")
    run.finish("prepare", outputs)
    assert run.is_done("prepare")
    outputs[0].write_text("cont")
    assert not run.is_done("prepare")
    told = "images/a has 4 bytes instead of 7; run vqbeam prepare .* again, which writes only what"
    with pytest.raises(VqbeamError, match=told):
        run.require("prepare")
    # A run that was handed over without its images is not prepared again unasked.
    for output in outputs:
        output.unlink()
    with pytest.raises(VqbeamError, match="images/a is missing"):
        run.is_done("prepare")


def test_outputs_may_lie_in_folders(run):
    run.begin("sample")
    output = run.folder("sample") / "images" / "0.png"
    output.parent.mkdir()
    output.write_text("png")
    assert run.finish("sample", [output])["outputs"] == {"images/0.png": 3}
    run.require("sample")


def test_require_says_what_to_run_first(run):
    with pytest.raises(VqbeamError, match="no finished encode stage; run vqbeam encode PRESET"):
        run.require("encode")


def test_fingerprint_changes_with_all_that_a_stage_reads(run, tmp_path, tiny_config):
    prints = [run.fingerprint("train-vqvae"), run.fingerprint("encode")]
    assert run.fingerprint("train-vqvae") == prints[0]
    finish(run, "prepare")
    prints.append(run.fingerprint("train-vqvae"))
    finish(run, "prepare", text="another content")
    prints.append(run.fingerprint("train-vqvae"))
    other = RunFolder(tmp_path / "other")
    other.start(tiny_config(seed=1))
    prints.append(other.fingerprint("train-vqvae"))
    assert len(set(prints)) == 5
    # It does not change with what the stage itself writes.
    finish(run, "train-vqvae")
    assert run.fingerprint("train-vqvae") == prints[3]


def test_fingerprint_does_not_change_with_the_settings_of_other_stages(run, tiny_config):
    finish(run, "prepare")
    before = run.fingerprint("train-vqvae")
    run.start(tiny_config(prior__layers=2))
    assert run.fingerprint("train-vqvae") == before
    run.start(tiny_config(prior__layers=2, vqvae__num_codes=16))
    assert run.fingerprint("train-vqvae") != before


def test_fingerprint_does_not_depend_on_the_place(tmp_path, tiny_config):
    prints = set()
    for name in ("one", "two"):
        run = RunFolder(tmp_path / name)
        run.start(tiny_config())
        finish(run, "prepare")
        prints.add(run.fingerprint("train-vqvae"))
    assert len(prints) == 1


def test_a_stage_reads_only_what_runs_before_it():
    names = list(STAGES)
    for index, (_, sources) in enumerate(STAGES.values()):
        assert set(sources) <= set(names[:index])
    assert len({folder for folder, _ in STAGES.values()}) == len(STAGES)


def test_every_file_is_looked_at_once(run, monkeypatch):
    finish_all(run)
    looked = []
    size = files.size
    monkeypatch.setattr(files, "size", lambda path: looked.append(path) or size(path))
    assert run.done(STAGES) == set(STAGES)
    assert len(looked) == len(set(looked)) == len(STAGES)
    looked.clear()
    assert run.done(["train-vqvae"]) == {"train-vqvae"}
    assert {path.parent.name for path in looked} == {"images", "vqvae"}


def test_the_limit_of_failed_images_is_no_part_of_what_is_made(tmp_path, tiny_config):
    prints = set()
    for name, share in (("a", 0.01), ("b", 0.5)):
        run = RunFolder(tmp_path / name)
        run.start(tiny_config(data__max_failed=share))
        prints.add(run.fingerprint("prepare"))
    assert len(prints) == 1
    run = RunFolder(tmp_path / "c")
    run.start(tiny_config(data__images_per_shard=9))
    assert run.fingerprint("prepare") not in prints


def test_checkpoints_are_found_whatever_the_folder_is_called(tmp_path, tiny_config):
    run = RunFolder(tmp_path / "runs[1]" / "*a?")
    run.start(tiny_config())
    assert run.trained_steps("train-prior") == 0
    names = ["step-00000010", "step-00000009", ".step-00000011"]
    for name in names:
        write_checkpoint(run, "train-prior", name)
    assert run.trained_steps("train-prior") == 10
    # By number, and not by name; those of earlier versions by the steps of their epochs.
    for name in ("step-99999999", "step-100000000", "epoch-00002"):
        write_checkpoint(run, "train-prior", name)
    assert run.trained_steps("train-prior") == 100_000_000
    found = checkpoint_files(run.folder("train-prior") / "checkpoints" / "f", 500)
    assert list(found) == [9, 10, 1000, 99_999_999, 100_000_000]
    assert found[1000].name == "epoch-00002.weights.h5"
    with pytest.raises(VqbeamError, match="a different config .prior.layers: "):
        run.start(tiny_config(prior__layers=2))


def test_two_attempts_may_end_at_the_same_time(run):
    run.begin("prepare")
    run.begin("prepare")
    first = run.finish("prepare", [], counts={"train": 5})
    second = run.finish("prepare", [], counts={"train": 5})
    assert first["sha256"] == second["sha256"] and run.is_done("prepare")


def test_models_are_used_together_only_if_they_belong_together(run):
    finish_all(run)
    models = ("train-vqvae", "train-prior")
    finish(run, "prepare", text="other images")
    assert run.require("train-prior", among=models)
    with pytest.raises(VqbeamError, match="made from inputs that have changed since"):
        run.require("train-prior")
    finish(run, "train-vqvae", text="another model")
    with pytest.raises(VqbeamError, match="made from inputs that have changed since"):
        run.require("train-prior", among=models)


def test_manifests_of_earlier_versions_name_direct_inputs_alone(run):
    finish_all(run)
    for stage in STAGES:
        path = run.folder(stage) / MANIFEST
        manifest = json.loads(path.read_text())
        del manifest["made_from"]
        manifest["inputs"] = {name: run.result_hash(name) for name in manifest["inputs"]}
        manifest["sha256"] = _hash_of(manifest)
        path.write_text(json.dumps(manifest))
    assert run.done(STAGES) == set(STAGES) and run.require("sample")
    finish(run, "train-vqvae", text="another model")
    with pytest.raises(VqbeamError, match="made from inputs that have changed since"):
        run.require("train-prior", among=("train-vqvae", "train-prior"))


def test_a_finished_model_is_not_replaced(run):
    finish_all(run)
    for stage in STAGES:
        run.check_replaceable(stage)
    finish(run, "prepare", text="other images")
    run.check_replaceable("encode")  # codes are made again from the model
    message = "vqvae holds a finished model, and its inputs have changed.* --retrain train-vqvae"
    with pytest.raises(VqbeamError, match=message):
        run.check_replaceable("train-vqvae")
