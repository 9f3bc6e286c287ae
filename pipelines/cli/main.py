"""The command line: its commands, early checks, one-line errors, and a quiet start."""

import atexit
import contextlib
import dataclasses
import difflib
import gc
import importlib.machinery
import io
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli import (
    completion,
    measure_commands,
    sampling_commands,
    stage_commands,
)
from vqbeam.pipelines.cli.parser import Parser, UsageError
from vqbeam.pipelines.errors import INTERRUPTED, is_interrupt, printable, user_message
from vqbeam.pipelines.paths import check_output


@dataclasses.dataclass(frozen=True)
class Verb:
    """A command, such as `vqbeam sample`.

    Attributes:
        summary: What it does, for the help.
        parse: Returns the keyword arguments of `run` for the words after the command.
        run: Does the work; a string that it returns is printed.
        needs: Stages of the run that must be finished.
        outputs: Allowed endings of --output; "" stands for a folder.
    """

    summary: str
    parse: Callable[[Parser, Sequence[str]], dict[str, Any]]
    run: Callable[..., str | None]
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


_TEMPORARY = "vqbeam-temporary-"
_STAGES = (stage_commands.parse_stages, stage_commands.run_stages)

VERBS = {
    "run": Verb("take a dataset to new images: all stages as one Beam pipeline", *_STAGES),
    "prepare": Verb("write the images of a dataset, cropped and resized, as TFRecords", *_STAGES),
    "train-vqvae": Verb("train the VQ-VAE on the prepared images", *_STAGES),
    "encode": Verb(
        "turn every image into a grid of codes, as TFRecords",
        stage_commands.parse_encode,
        stage_commands.run_encode,
        needs=("train-vqvae",),  # with --model; a stage checks its inputs itself
    ),
    "train-prior": Verb("train the transformer prior on the codes", *_STAGES),
    "sample": Verb(
        "sample new images from a trained run",
        sampling_commands.parse_sample,
        sampling_commands.run_sample,
        needs=stage_commands.MODELS,
        outputs=(".png", ".npz", ""),
    ),
    "generate": Verb(
        "sample many images in parallel, as a Beam pipeline; resumable",
        sampling_commands.parse_generate,
        sampling_commands.run_generate,
        needs=stage_commands.MODELS,
    ),
    "complete": Verb(
        "sample the missing part of images, several times",
        sampling_commands.parse_complete,
        sampling_commands.run_complete,
        needs=stage_commands.MODELS,
        outputs=(".png", ""),
    ),
    "interpolate": Verb(
        "sample images between one class and another",
        sampling_commands.parse_interpolate,
        sampling_commands.run_interpolate,
        needs=stage_commands.MODELS,
        outputs=(".png",),
    ),
    "reconstruct": Verb(
        "plot held-out images above their reconstructions",
        measure_commands.parse_reconstruct,
        measure_commands.run_reconstruct,
        needs=("prepare", "train-vqvae"),
        outputs=(".png",),
    ),
    "evaluate": Verb(
        "measure a trained run on its held-out images",
        measure_commands.parse_evaluate,
        measure_commands.run_evaluate,
        needs=("prepare", "train-vqvae"),
    ),
    "score": Verb(
        "print the log-likelihood of images of your own",
        measure_commands.parse_score,
        measure_commands.run_score,
        needs=stage_commands.MODELS,
        outputs=(".jsonl",),
    ),
    "export": Verb(
        "write a trained run as a SavedModel, or its weights as safetensors",
        measure_commands.parse_export,
        measure_commands.run_export,
        needs=stage_commands.MODELS,
    ),
    "export-codes": Verb(
        "write the codes of all images as one NumPy or Parquet file",
        measure_commands.parse_export_codes,
        measure_commands.run_export_codes,
        needs=("train-vqvae", "encode"),
        outputs=(".npz", ".parquet"),
    ),
    "push": Verb(
        "publish the models of a run on the Hugging Face hub",
        measure_commands.parse_push,
        measure_commands.run_push,
        needs=("train-vqvae",),
    ),
    "inspect": Verb(
        "show the state of a run: stages, sizes, losses, codebook usage",
        measure_commands.parse_inspect,
        measure_commands.run_inspect,
    ),
    "report": Verb(
        "write a page about a run: pictures, advice, curves, metrics",
        measure_commands.parse_report,
        measure_commands.run_report,
        outputs=(".html",),
    ),
    "studio": Verb(
        "try out a trained run in the browser",
        measure_commands.parse_studio,
        measure_commands.run_studio,
        needs=stage_commands.MODELS,
    ),
    "gradients": Verb(
        "plot which losses reach which parts of a model",
        measure_commands.parse_gradients,
        measure_commands.run_gradients,
        outputs=(".png",),
    ),
    "presets": Verb(
        "list the presets, or the settings of one",
        measure_commands.parse_presets,
        measure_commands.run_presets,
    ),
    "completion": Verb(
        "print a script that lets a shell complete commands",
        completion.parse_completion,
        completion.run_completion,
    ),
}

# The groups of commands in the help.
_GROUPS = {
    "train a model": ("run", "prepare", "train-vqvae", "encode", "train-prior", "presets"),
    "make images": ("sample", "generate", "complete", "interpolate", "studio"),
    "examine a model": ("inspect", "report", "evaluate", "reconstruct", "score", "gradients"),
    "use it elsewhere": ("push", "export", "export-codes", "completion"),
}

_TOP_DESCRIPTION = """\
Trains a two-stage generative model of images: a VQ-VAE turns images into grids of codes, and a
transformer learns the codes. Every stage scales with Apache Beam.

{verbs}

example:
  vqbeam run glyphs --run-dir runs/glyphs
  vqbeam sample runs/glyphs --num 26 --output letters.png

"vqbeam COMMAND --help" describes a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of one command line, which it runs.

    Args:
        argv: The words after `vqbeam`; by default those of this process.
    """
    try:
        _collect_garbage_less_often()
        _be_quiet()
        _set_up_devices()
        if sys.stderr is None:  # closed, as by 2>&-
            sys.stderr = open(os.devnull, "w")
        with _checked_output():
            _dispatch(*parse(sys.argv[1:] if argv is None else argv))
        return 0
    except SystemExit as end:
        return end.code or 0
    except UsageError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; Python would print an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if is_interrupt(error):
            print(INTERRUPTED, file=sys.stderr)
            return 130
        message = user_message(error)
        if message is None:
            raise
        print(f"vqbeam: {printable(message)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _checked_output() -> Iterator[None]:
    """A context in which control characters and unsupported ones are printed as escapes."""
    if sys.stdout is None:  # closed by the shell
        raise VqbeamError("the output is closed; give it a place, such as > /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(_Printable(sys.stdout)):
        yield
        sys.stdout.flush()


class _Printable:
    """A text stream that writes control characters as escapes."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _dispatch(verb: str, arguments: dict[str, Any]) -> None:
    arguments = _with_local_runs(arguments)
    check(verb, arguments)
    with _temporary_folder():
        text = VERBS[verb].run(**arguments)
    if isinstance(text, str):
        print(text)


def _with_local_runs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with a local folder for each run; those on the hub are downloaded."""
    one, several = arguments.get("run_dir"), arguments.get("run_dirs")
    if not one and several is None:
        return arguments
    from vqbeam.pipelines.hub import local_run

    if several is None:
        return arguments | {"run_dir": local_run(one)}
    return arguments | {"run_dirs": [local_run(place) for place in several]}


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """Gives the libraries a folder for temporary files, and removes those of killed commands.

    When a command is killed, Beam and TensorFlow leave their files behind. A running command holds
    a lock on its folder.
    """
    from etils import epath

    from vqbeam.pipelines.lock import flocked

    system, before = epath.Path(tempfile.gettempdir()), os.environ.get("TMPDIR")
    for left in system.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError), flocked(left) as is_dead:
            if is_dead and os.stat(left).st_uid == os.getuid():
                left.rmtree()
    with contextlib.ExitStack() as held:
        own = _new_folder(held)
        tempfile.tempdir = os.environ["TMPDIR"] = own
        try:
            yield
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
            os.environ.update({"TMPDIR": before} if before else {})
            shutil.rmtree(own, ignore_errors=True)


def _new_folder(held: contextlib.ExitStack) -> str:
    """Returns a new temporary folder, which is locked until `held` ends."""
    from etils import epath

    from vqbeam.pipelines.lock import flocked

    while True:
        own = tempfile.mkdtemp(prefix=_TEMPORARY)
        # Until it is locked, another command may take it for one that was left behind.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            held.enter_context(flocked(epath.Path(own)))
            if os.path.exists(own):
                return own


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Returns the name of the command and the keyword arguments of its `run`.

    Args:
        argv: The words after `vqbeam`.

    Raises:
        UsageError: A command or flag is unknown, or something is missing or malformed.
        VqbeamError: The preset does not exist, or a value is out of its range.
        SystemExit: Help or the version was requested, and has been printed.
    """
    if not argv:
        raise UsageError(_top_parser().format_help().rstrip())
    verb, words = argv[0], argv[1:]
    if verb == "help":
        verb, words = [*words, "--help"][0], ["--help"]
    if verb.startswith("-"):
        _top_parser().parse_words([verb])
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see vqbeam --help"
        raise UsageError(f"vqbeam: unknown command {verb!r}; {hint}")
    parser = Parser(verb, VERBS[verb].summary)
    return verb, VERBS[verb].parse(parser, words)


def _top_parser() -> Parser:
    verbs = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<13} {VERBS[name].summary}" for name in names)])
        for title, names in _GROUPS.items()
    )
    parser = Parser("")
    parser.describe("COMMAND ...", description=_TOP_DESCRIPTION.format(verbs=verbs))
    return parser


def check(name: str, arguments: dict[str, Any]) -> None:
    """Checks the folders, files and labels that a command names, before TensorFlow loads.

    Raises:
        VqbeamError: One of them is missing or unsuitable for the command.
    """
    verb = VERBS[name]
    if verb.outputs and arguments["output"]:
        check_output(arguments["output"], verb.outputs)
    if "stages" in arguments:
        _check_stages(arguments)
    elif verb.needs:
        _check_run(verb.needs, arguments)
    if verb.outputs and arguments["output"]:
        _tell_what_is_replaced(arguments["output"])


def _tell_what_is_replaced(output: str) -> None:
    """Prints what the command is going to replace, so that Ctrl-C can still prevent it."""
    if os.path.isfile(output):
        print(f"{output} exists: it will be replaced", file=sys.stderr)
    elif os.path.isdir(output) and os.listdir(output):
        print(
            f"{output} is not empty: files of the same names will be replaced, and images that an "
            "earlier command listed there",
            file=sys.stderr,
        )


def _check_stages(arguments: dict[str, Any]) -> None:
    run_dir, data = arguments["run_dir"], arguments["config"].data
    if os.path.isfile(run_dir):
        raise VqbeamError(f"{run_dir} is a file, not a folder; choose another --run-dir")
    if "wandb" in arguments["config"].log_to:
        importlib.import_module("wandb")  # to report its absence before any work
    kind, _, path = data.source.partition(":")
    is_needed = "prepare" in arguments["stages"] and not _is_prepared(run_dir)
    if is_needed and kind == "folder" and "://" not in path:
        from vqbeam.pipelines.sources.folder import check_folder

        check_folder(path)


def _is_prepared(run_dir: str) -> bool:
    from vqbeam.vqvae.storage.run_folder import RunFolder

    run = RunFolder(run_dir)
    return run.exists() and run.manifest("prepare") is not None


def _check_run(needs: tuple[str, ...], arguments: dict[str, Any]) -> None:
    from vqbeam.vqvae.storage.labels import Labels, parse_label
    from vqbeam.vqvae.storage.run_folder import RunFolder

    run = RunFolder(arguments["run_dir"])
    run.load_config()
    manifests = {stage: run.require(stage, among=needs) for stage in needs}
    named = [arguments.get(name) for name in ("label", "start", "end")]
    for label in [*named, *(arguments.get("labels") or [])]:
        if label is not None:
            parse_label(label, Labels.of(manifests["train-prior"]))


def _collect_garbage_less_often() -> None:
    """Spares most of Python's searches for garbage among a million objects of the libraries.

    They would take a second while the libraries load, and another one or two at exit.
    """
    gc.set_threshold(5_000, 10, 10)
    atexit.register(gc.freeze)


def _set_up_devices() -> None:
    """Sets how the libraries use a GPU; to be called before they are imported."""
    # Do not reserve all of a GPU's memory at the start, so that two programs can share it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; JAX refuses both
        # By default, JAX takes at most three quarters of it.
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    # Keep what JAX compiles for later commands.
    cache = os.path.expanduser("~/.cache/vqbeam/jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)


def _be_quiet() -> None:
    """Silences all messages of the libraries except errors; to be called before their import."""
    # At level 2, TensorFlow still reports a missing GPU driver on machines without a GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in (None, "absl", "apache_beam", "tensorflow", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Beam raises a worker's exception; without this, it would also log it with a traceback.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    logging.getLogger("apache_beam.runners.worker").setLevel(logging.CRITICAL)
    sys.meta_path.insert(0, _QuietTensorFlow())


class _QuietTensorFlow:
    """An import hook that drops the lines that TensorFlow's C++ code logs while loading.

    They are written before logging is initialized, so no setting silences them.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec:
            spec.loader.exec_module = _without_start_up_noise()(spec.loader.exec_module)
        return spec


@contextlib.contextmanager
def _without_start_up_noise() -> Iterator[None]:
    """A context that drops C++ log lines from stderr and keeps everything else."""
    sys.stderr.flush()
    stderr = os.dup(2)
    if sys.stderr.isatty():
        os.write(2, b"loading TensorFlow ...\r")
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            if sys.stderr.isatty():
                os.write(2, b"\033[K")
            held.seek(0)
            for line in held:
                if not re.match(rb"WARNING: All log messages before absl|[IW]\d{4} ", line):
                    os.write(2, line)
