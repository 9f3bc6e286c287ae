import subprocess
import sys

import pytest

from vqbeam.pipelines.cli.main import VERBS, main

shtab = pytest.importorskip("shtab", reason="needs pip install -e .[completion]")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "vqbeam.bash"
    with pytest.MonkeyPatch.context() as patch, open(path, "w") as file:
        patch.setattr(sys, "stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


@pytest.fixture
def completed(script, tmp_path):
    """Returns what bash offers for the last of the given words."""

    def run(*words):
        line = " ".join(f"'{word}'" for word in ("vqbeam", *words))
        ask = f"""
            source {script}
            function=$(complete -p vqbeam | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
            COMP_WORDS=({line}) COMP_CWORD={len(words)}
            $function
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(
            ["bash", "--norc", "-c", ask], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return [word.strip() for word in done.stdout.split()]

    return run


def test_commands_are_completed(completed):
    assert completed("sam") == ["sample"]
    assert completed("train-v") == ["train-vqvae"]
    assert set(VERBS) <= set(completed(""))


def test_flags_of_a_command_are_completed(completed):
    assert completed("sample", "--temp") == ["--temperature"]
    assert completed("run", "--vqvae.num-c") == ["--vqvae.num-codes"]
    assert completed("train-prior", "--lo") == ["--log"]
    assert completed("inspect", "--vqvae.num-c") == []


def test_presets_and_values_are_completed(completed):
    assert completed("run", "gly") == ["glyphs"]
    assert completed("run", "--vqvae.quantizer", "res") == ["residual"]


def test_folders_are_completed(completed, tmp_path):
    (tmp_path / "runs").mkdir()
    assert completed("sample", "ru") == ["runs"]


def test_zsh(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef vqbeam")
