import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from commands import started, status_of
from hub_server import files_in, hub
from pipeline_fixtures import finish_again, write_measures, write_preset

import vqbeam
from vqbeam.configs import VqbeamError, from_dict, to_dict
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.hub import push

NAME = "me/fruit"
PUBLISHED = {
    "README.md",
    "checksums.json",
    "config.json",
    "prior/manifest.json",
    "prior/model.keras",
    "samples.png",
    "vqvae/manifest.json",
    "vqvae/model.keras",
}


def test_a_folder_holds_what_sampling_needs_and_no_more(finished_run, tmp_path):
    target = tmp_path / "published"
    assert push(str(finished_run.root), str(target)) == f"published: {target}"
    files = files_in(target)
    assert set(files) == PUBLISHED
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    # Folders of this machine are nobody's business.
    config = from_dict(json.loads(files["config.json"]))
    assert (
        config.data.source == "folder:source" and config.vqvae == finished_run.load_config().vqvae
    )
    place = str(finished_run.root.parent).encode()
    assert not [name for name, content in files.items() if place in content]
    ours, theirs = vqbeam.open(finished_run.root), vqbeam.open(target)
    expected, found = (run.sample(4, seed=1) for run in (ours, theirs))
    np.testing.assert_array_equal(found.images, expected.images)
    assert theirs.labels == ours.labels


def test_names_of_places_of_ones_own_are_not_published(own_run, tmp_path):
    run, _ = own_run
    config = run.load_config()
    vqvae = replace(config.vqvae, init_from="/home/me/runs/first@0123456789abcdef")
    changed = replace(config, vqvae=vqvae, log="wandb:secret")
    (run.root / "config.json").write_text(json.dumps(to_dict(changed)))
    push(str(run.root), str(tmp_path / "published"))
    published = vqbeam.open(tmp_path / "published").config
    assert published.vqvae.init_from == "first@0123456789abcdef"
    assert published.log is None


def test_the_card_says_what_it_is_and_how_to_use_it(finished_run, tmp_path):
    push(str(finished_run.root), str(tmp_path / "fruit"))
    card = (tmp_path / "fruit" / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n")
    assert "library_name: vqbeam" in front.splitlines()
    psnr = finished_run.manifest("train-vqvae")["measures"]["psnr"]
    assert f"| reconstruction of held-out images | PSNR {psnr:.2f} dB |" in body
    assert "| classes | Banana, apple, cherry |" in body and "| data | folder:source |" in body
    code = body.partition("```python\n")[2].partition("```")[0]
    found: dict = {}
    exec(code, found)
    assert found["samples"].images.shape[0] == 8


def test_a_vqvae_alone(own_run, tmp_path):
    run, _ = own_run
    run.folder("train-prior").rmtree()
    push(str(run.root), str(tmp_path / "tokenizer"))
    expected = {name for name in PUBLISHED if not name.startswith(("prior", "samples"))}
    assert set(files_in(tmp_path / "tokenizer")) == expected
    code = (tmp_path / "tokenizer" / "README.md").read_text()
    assert "codes = run.encode(images)" in code


def test_what_is_of_another_model_is_left_out(own_run, tmp_path):
    run, _ = own_run
    write_measures(run, "prior", samples={"frechet": 1.25})
    push(str(run.root), str(tmp_path / "one"))
    assert "Fréchet distance of samples, by `vqbeam evaluate` | 1.250 |" in card(tmp_path / "one")
    finish_again(run, "train-prior", measures={"nats_per_code": 1.0})
    push(str(run.root), str(tmp_path / "other"))
    assert "Fréchet" not in card(tmp_path / "other")
    assert {*files_in(tmp_path / "one")} - {*files_in(tmp_path / "other")} == {"samples.png"}


def card(folder):
    return (folder / "README.md").read_text()


def test_an_existing_folder_is_kept(finished_run, tmp_path, failure):
    (tmp_path / "mine").mkdir()
    message = failure("push", finished_run.root, tmp_path / "mine")
    assert f"{tmp_path / 'mine'} is there already; choose another folder, or delete it" in message
    assert not list((tmp_path / "mine").iterdir())


def test_only_a_repository_is_private(finished_run, capsys):
    assert cli.main(["push", str(finished_run.root), "new", "--private"]) == 2
    assert "--private is for hf://USER/NAME" in capsys.readouterr().err


@pytest.fixture
def commands(tmp_path):
    """Runs commands with an empty cache of the hub; returns what they say."""

    def run(repository, *words, status=0):
        log = tmp_path / "log.txt"
        log.write_text("")
        assert status_of(log, *words, environment=environment(repository)) == status, (
            log.read_text()
        )
        return log.read_text()

    def environment(repository):
        return {
            "HF_ENDPOINT": repository.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_of_mine",
            "NO_PROXY": "*",
        }

    run.environment = environment
    return run


@pytest.fixture
def published(finished_run, tmp_path):
    """The files of a repository, which `push` has written into a folder."""
    push(str(finished_run.root), str(tmp_path / "published"))
    return files_in(tmp_path / "published")


@pytest.mark.system
def test_used_by_name(finished_run, published, tmp_path, commands):
    with hub(NAME, published, "models") as repository:
        drawn = tmp_path / "drawn.npz"
        words = ("--num", 4, "--seed", 1, "--output", drawn)
        commands(repository, "sample", f"hf://{NAME}@main", *words)
        told = commands(repository, "sample", "hf://me/fruits", *words, status=1)
        assert told.startswith("vqbeam: hf://me/fruits cannot be downloaded (")
        assert told.count("\n") == 1
    expected = vqbeam.open(finished_run.root).sample(4, seed=1)
    with np.load(drawn) as arrays:
        np.testing.assert_array_equal(arrays["images"], expected.images)


@pytest.mark.system
def test_trained_on_and_encoded_with_by_name(finished_run, published, tmp_path, commands):
    preset = write_preset(tmp_path / "preset.py", finished_run.load_config())
    source = finished_run.load_config().data.source
    with hub(NAME, published, "models") as repository:
        words = ("--model", f"hf://{NAME}", "--data.source", source, "--data.max-failed", 0.1)
        said = commands(repository, "encode", *words, "--output", tmp_path / "codes")
        model = finished_run.result_hash("train-vqvae")[:16]
        assert "codes: 24 new, 0 there before" in said and f"model: {model}" in said
        words = (preset, "--run-dir", tmp_path / "run", "--init-from", f"hf://{NAME}")
        commands(repository, "prepare", *words)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["vqvae"]["init_from"].endswith(f"@{model}") and config["prior"]["init_from"]


@pytest.mark.system
def test_published_in_one_commit_even_when_killed(finished_run, tmp_path, commands):
    log = tmp_path / "killed.txt"
    with hub(NAME, {}, "models") as repository:

        def killed(*words):
            repository.stalls = 1
            with started(log, *words, environment=commands.environment(repository)) as process:
                while repository.stalls > 0:
                    assert process.poll() is None, log.read_text()
                process.kill()

        killed("push", finished_run.root, f"hf://{NAME}")
        assert not repository.files and not repository.commits
        said = commands(repository, "push", finished_run.root, f"hf://{NAME}")
        assert said.splitlines()[-1] == f"published: {repository.endpoint}/{NAME}"
        assert set(repository.files) == PUBLISHED and repository.commits == 1
        killed("inspect", f"hf://{NAME}")
        assert "bits per dimension" in commands(repository, "inspect", f"hf://{NAME}")
        # What was damaged on the way, or on this disk, is not used.
        model = next((tmp_path / "home").rglob("snapshots/*/prior/model.keras"))
        model.write_bytes(model.read_bytes()[:-1])
        told = commands(repository, "inspect", f"hf://{NAME}", status=1)
        assert told.startswith(f"vqbeam: {model} is damaged; delete ") and told.count("\n") == 1
        shutil.rmtree(re.search("delete (.*) and run the same command again", told)[1])
        assert "bits per dimension" in commands(repository, "inspect", f"hf://{NAME}")


@pytest.mark.system
def test_a_repository_of_something_else(commands):
    with hub(NAME, {"config.json": b"{}"}, "models") as repository:
        told = commands(repository, "inspect", f"hf://{NAME}", status=1)
    assert told == f"vqbeam: hf://{NAME} is not a run that `vqbeam push` has published\n"


def test_what_cannot_be_written_to(failure, finished_run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = failure("push", finished_run.root, f"hf://{NAME}")
    assert f"hf://{NAME} cannot be written (" in message and "hf auth login" in message
    with pytest.raises(VqbeamError, match="cannot be downloaded"):
        vqbeam.open(f"hf://{NAME}")
