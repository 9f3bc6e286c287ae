import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import types

import pytest
from commands import started, status_of, wait_for
from pipeline_fixtures import small_config, write_images, write_preset

from vqbeam import configs
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main

PRESET = """
from vqbeam.configs import Config, DataConfig

CONFIG = Config(name="own", data=DataConfig(source="glyphs"))
"""
MESSAGE = "folder 'x' holds no image; give another"


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """Keeps the logging and importing of the test process as they are."""
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


@pytest.fixture
def target(monkeypatch):
    """Replaces a function that `main` dispatches to; returns the list of its calls."""
    monkeypatch.setattr(cli, "check", lambda verb, arguments: None)

    def replace(module, function, outcome=None):
        calls = []

        def called(**arguments):
            calls.append(arguments)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        fake = types.SimpleNamespace(**{function: called})
        monkeypatch.setitem(sys.modules, f"vqbeam.pipelines.{module}", fake)
        return calls

    return replace


def vqbeam(*words):
    return subprocess.run(
        [sys.executable, "-m", "vqbeam", *words], capture_output=True, text=True, timeout=120
    )


def test_run_dispatch(target, tmp_path):
    preset = tmp_path / "own.py"
    preset.write_text(PRESET)
    calls = target("run", "run_stages")
    assert main(["encode", str(preset), "--run-dir", "d"]) == 0
    assert calls == [
        {
            "config": configs.load_preset(str(preset)),
            "run_dir": "d",
            "stages": ("encode",),
            "beam_args": ["--runner=FnApiRunner"],
            "retrain": [],
            "minutes": None,
            "extend": False,
        }
    ]


def test_sample_dispatch(target):
    calls = target("sampling.sample", "sample")
    assert main(["sample", "d", "--num", "2", "--label", "A"]) == 0
    assert calls[0]["run_dir"] == "d"
    assert calls[0]["num"] == 2
    assert calls[0]["labels"] == ["A"]


def test_reconstruct_dispatch(target):
    calls = target("evaluation.reconstructions", "reconstruct")
    assert main(["reconstruct", "d", "--output", "a.png", "--num", "3"]) == 0
    assert calls == [{"run_dir": "d", "output": "a.png", "num": 3}]


def test_evaluate_dispatch(target):
    calls = target("evaluation.evaluate", "evaluate")
    assert main(["evaluate", "d", "--features", "inception"]) == 0
    assert [(call["run_dir"], call["features"]) for call in calls] == [("d", "inception")]


def test_inspect_dispatch(target, capsys):
    calls = target("inspect", "describe", "all about it")
    assert main(["inspect", "d"]) == 0
    assert calls == [{"run_dir": "d"}]
    assert capsys.readouterr().out == "all about it\n"


def test_report_dispatch(target, capsys):
    calls = target("report.page", "report", "report: d/report.html")
    assert main(["report", "d", "e", "--output", "f.html"]) == 0
    assert calls == [{"run_dirs": ["d", "e"], "output": "f.html"}]
    assert capsys.readouterr().out == "report: d/report.html\n"


def test_studio_dispatch(target):
    calls = target("studio", "studio")
    assert main(["studio", "d"]) == 0 and main(["studio", "d", "--port", "80"]) == 0
    assert calls == [{"run_dir": "d", "port": 7860}, {"run_dir": "d", "port": 80}]
    for port in ("0", "65536", "x"):
        assert main(["studio", "d", "--port", port]) == 2


def test_presets(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == configs.preset_names()
    for line in lines:
        assert configs.preset_summary(line.split()[0]) in line


@pytest.mark.parametrize(
    "error,status,line",
    [
        (VqbeamError(MESSAGE), 1, f"vqbeam: {MESSAGE}\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            1,
            "vqbeam: /a/b: Permission denied; choose another place, or ask for the permission\n",
        ),
        (KeyboardInterrupt(), 130, "\nvqbeam: interrupted; run the same command to go on\n"),
        # As Beam gives it on.
        (
            RuntimeError("KeyboardInterrupt [while running 'encode/WriteShard']"),
            130,
            "\nvqbeam: interrupted; run the same command to go on\n",
        ),
    ],
)
def test_errors_are_one_line_and_a_status(target, capsys, error, status, line):
    target("inspect", "describe", error)
    assert main(["inspect", "d"]) == status
    assert capsys.readouterr() == ("", line)


def test_who_reads_may_stop_reading():
    reads, writes = os.pipe()
    os.close(reads)
    words = [sys.executable, "-m", "vqbeam", "presets"]
    done = subprocess.run(words, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


def test_control_characters_are_shown_and_not_obeyed(target, capsys):
    target("inspect", "describe", "a\tlabel \x1b[31m\x07\n\x9b2J\u202e")
    assert main(["inspect", "d"]) == 0
    assert capsys.readouterr().out == "a\tlabel \\x1b[31m\\x07\n\\x9b2J\\u202e\n"
    target("inspect", "describe", VqbeamError("file \x1b]0;title\x07"))
    assert main(["inspect", "d"]) == 1
    assert capsys.readouterr().err == "vqbeam: file \\x1b]0;title\\x07\n"
    assert main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_terminal_of_few_characters(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = vqbeam("presets")
    assert done.returncode == 0 and r"32\xd732" in done.stdout


def test_closed_output():
    done = subprocess.run(
        [sys.executable, "-m", "vqbeam", "presets"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.close(1),
    )
    assert done.returncode == 1 and done.stderr.startswith("vqbeam: the output is closed")
    assert done.stderr.count("\n") == 1


@pytest.mark.system
def test_a_closed_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "vqbeam", "presets"],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.close(2),
    )
    assert done.returncode == 0 and b"glyphs" in done.stdout


def test_a_temporary_folder_that_another_command_removes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tried = []

    @contextlib.contextmanager
    def flocked(folder):
        tried.append(folder)
        if len(tried) == 1:
            raise BlockingIOError
        if len(tried) == 2:
            folder.rmdir()
        yield True

    monkeypatch.setattr("vqbeam.pipelines.lock.flocked", flocked)
    with contextlib.ExitStack() as held:
        assert cli._new_folder(held) == str(tried[-1])
    assert len(tried) == 3


@pytest.mark.system
def test_temporary_files_do_not_stay_behind(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write_images(tmp_path / "source", 300)
    preset = write_preset(
        tmp_path / "preset.py",
        small_config(f"folder:{tmp_path / 'source'}", data__images_per_shard=1),
    )
    words = ("prepare", preset, "--run-dir", tmp_path / "run")
    log = tmp_path / "log.txt"
    with started(log, *words) as process:
        wait_for("images/.reports-*/*.json", tmp_path / "run", process, log)
    # Killed; its files are there, among which is a folder of Beam's.
    (left,) = (tmp_path / "tmp").iterdir()
    assert any(path.name.startswith("beam-pipeline-temp") for path in left.iterdir())
    with cli._temporary_folder():  # of a command that is at work
        own = tempfile.gettempdir()
        assert status_of(log, *words) == 0, log.read_text()
        assert [str(path) for path in (tmp_path / "tmp").iterdir()] == [own]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path / "tmp")


def test_a_bug_keeps_its_traceback(target):
    target("inspect", "describe", ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        main(["inspect", "d"])


def test_usage_errors(capsys):
    assert main(["smaple"]) == 2
    assert capsys.readouterr().err == "vqbeam: unknown command 'smaple'; did you mean sample?\n"
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: vqbeam COMMAND ...")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: vqbeam COMMAND ...")


def test_help_answers_without_the_heavy_libraries():
    code = """
import sys
from vqbeam.pipelines.cli.main import main
words = (["--help"], ["run", "--help"], ["presets"], ["smaple"], ["sample", "d", "--topk", "1"])
print([main(line) for line in words], file=sys.stderr)
heavy = {"tensorflow", "keras", "apache_beam", "tensorflow_datasets", "numpy", "gradio"}
heavy &= set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("[0, 0, 0, 2, 2]\n")


@pytest.mark.system
def test_python_m_vqbeam():
    done = vqbeam("run", "glyphs", "--run-dir", "d", "--runer=DataflowRunner")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "vqbeam: unknown flag --runer; did you mean --runner?\n"


@pytest.mark.slow
def test_programs_share_a_gpu_unless_told_otherwise(monkeypatch):
    names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "TF_FORCE_GPU_ALLOW_GROWTH")
    fractions = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in (*names, *fractions, "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "0")
    assert cli.main(["presets"]) == 0
    assert [os.environ[name] for name in names] == ["false", "0"]
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/home/someone/.cache/vqbeam/jax"
    assert os.environ.pop("XLA_CLIENT_MEM_FRACTION") == "0.95"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert cli.main(["presets"]) == 0
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ  # JAX refuses both


@pytest.mark.system
def test_the_libraries_start_quietly():
    code = """
from vqbeam.pipelines.cli import main as cli
cli._be_quiet()
import tensorflow as tf, tensorflow_datasets, keras_nlp, apache_beam
import sys
tf.function(lambda x: x @ x, jit_compile=True)(tf.ones((4, 4)))
sys.stderr.write("ours\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "ours\n"


def test_does_not_search_for_garbage_at_exit():
    code = """
import atexit, gc
atexit.register(lambda: print("spared:", gc.get_freeze_count() > 1000))
from vqbeam.pipelines.cli import main as cli
cli.main(["presets"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("spared: True\n"), done.stderr


def test_only_log_lines_are_dropped_from_stderr(capfd):
    with pytest.raises(ImportError):
        with cli._without_start_up_noise():
            os.write(2, b"I0000 00:00:1.2 3 port.cc:153] oneDNN\nan error\nE0000 00:00 x\n")
            raise ImportError("libtensorflow")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "an error\nE0000 00:00 x\nafter\n"
