import contextlib
import ctypes
import os
import pathlib
import re
import signal
import sys

# TensorFlow says much at start-up that no test reads.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Models are tiny and test workers fill the cores: more threads only get in each other's way.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# JAX compiles each program once for both workers and all later runs, however small it is.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import numpy as np
import pytest

from vqbeam.configs import Config, DataConfig, override

# The files that take longest, which start first, so that both workers end at about the same time;
# and one that needs half a gigabyte, while the workers are still small.
FIRST = (
    "test_harmful_images",
    *("test_training", "test_prior_training", "test_serving", "test_init_from", "test_sampler"),
    *("test_replicas", "test_pipeline_cli", "test_faults", "test_benchmarks"),
)


def pytest_ignore_collect(collection_path, config):
    """Leaves out files of which `-m` asks for no test, since to import them all takes long."""
    asked = config.getoption("markexpr")
    if not asked or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    of_all = re.search(r"^pytestmark = pytest\.mark\.(\w+)$", text, re.MULTILINE)
    if of_all and of_all[1] in re.findall(r"not (\w+)", asked):
        return True
    wanted = asked.partition(" ")[0]
    return (wanted in ("backend", "system") and f"mark.{wanted}" not in text) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Runs the files of `FIRST` before the others, and marks what needs a whole run as slow.

    With xdist, the order needs `--no-loadscope-reorder`.
    """
    items.sort(key=lambda item: item.path.stem not in FIRST)
    for item in items:
        if "finished_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Runs TensorFlow functions eagerly, since compiling them takes most of the time of a test.

    Commands that tests start as programs, and the tests that use `compiled`, compile as ever.
    """
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.run_functions_eagerly(True)


@contextlib.contextmanager
def compiling():
    """A context in which TensorFlow compiles functions, as it does outside of the tests."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(False)
    yield
    tf.config.run_functions_eagerly(True)


@pytest.fixture
def compiled():
    """For tests of compiled functions, and for training of more than about twenty steps."""
    with compiling():
        yield


@pytest.fixture(autouse=True)
def _forget_programs():
    """Frees what JAX compiled for a test: with the programs of all tests, it would need 4 GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        if sys.platform == "linux":  # whose C library otherwise keeps most of what is freed
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def interruptible():
    """Lets Ctrl-C end this process and those that it starts; background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _config(**changes):
    """The smallest config that trains; `vqvae__steps=4` sets the field `vqvae.steps`."""
    config = Config(
        name="tiny",
        data=DataConfig(source="glyphs", height=8, width=8, channels=1, images_per_shard=12),
    )
    small = {
        "vqvae.num_codes": 12,
        "vqvae.code_dim": 4,
        "vqvae.width": 8,
        "vqvae.residual_layers": 1,
        "vqvae.residual_width": 4,
        "vqvae.batch_size": 8,
        "vqvae.steps": 8,
        "vqvae.steps_per_epoch": 2,
        "encode.batch_size": 4,
    }
    return override(config, small | {k.replace("__", "."): v for k, v in changes.items()})


def _prepared_run(path, config, *, train=20, validation=10, labels=("a", "b"), kind="classes"):
    """A run folder with a finished prepare stage of random images.

    Image i has the class i modulo their number, or the attributes that the bits of i stand for.
    """
    # Here, so that tests of the command line alone import no TensorFlow.
    import tensorflow as tf
    from shard_files import write_shard

    from vqbeam.vqvae.storage import records
    from vqbeam.vqvae.storage.labels import Labels
    from vqbeam.vqvae.storage.run_folder import RunFolder

    run = RunFolder(path)
    run.start(config)
    run.begin("prepare")
    folder = run.folder("prepare")
    features = records.image_features(config.image_shape, Labels(tuple(labels), kind))
    numbers = np.random.default_rng(0)

    def label(i):
        if kind == "attributes":
            return {"attributes": np.array([i >> bit & 1 for bit in range(len(labels))], "uint8")}
        return {"label": i % len(labels)} if labels else {}

    counts = {"train": train, "validation": validation}
    splits, files, pixels = {}, [], {}
    for split, size in counts.items():
        pixels[split] = numbers.integers(0, 256, (size, *config.image_shape), np.uint8)
        examples = [
            {"image": tf.io.encode_png(image).numpy(), "key": f"{split}-{i}"} | label(i)
            for i, image in enumerate(pixels[split])
        ]
        per_shard = config.data.images_per_shard
        parts = [examples[i : i + per_shard] for i in range(0, size, per_shard)]
        for index, part in enumerate(parts):
            files.append(folder / records.Shard(folder.name, split, index, len(parts)).filename)
            written = [records.serialize(example) for example in part]
            size_in_bytes = write_shard(files[-1], written)
            splits.setdefault(split, []).append((len(part), size_in_bytes))
    files += records.write_metadata(
        folder,
        features,
        splits,
        name="images",
        version=records.IMAGES_VERSION,
        description="Noise.",
    )
    scaled = pixels["train"] / 127.5 - 1
    run.finish(
        "prepare",
        files,
        source=config.data.source,
        counts=counts,
        failed=0,
        label_names=list(labels),
        label_kind=kind,
        statistics={"mean": scaled.mean(), "variance": scaled.var(), "images_per_label": {}},
    )
    return run, pixels


@pytest.fixture(scope="session")
def tiny_config():
    """Makes the smallest config that trains, with some fields changed."""
    return _config


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory):
    """Makes a run folder with a finished prepare stage; returns it with its pixels by split."""
    import shutil

    from vqbeam.vqvae.storage.run_folder import RunFolder

    made = {}

    def make(config, **changes):
        key = repr((config.data, sorted(changes.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("prepared") / "run"
            made[key] = _prepared_run(path, config, **changes)
        first, pixels = made[key]
        # A copy, which a test may damage.
        run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
        run.start(config)
        shutil.copytree(first.folder("prepare"), run.folder("prepare"))
        return run, {split: images.copy() for split, images in pixels.items()}

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run with all its stages done, from a small folder of images in three classes."""
    from pipeline_fixtures import small_config, write_images

    from vqbeam.pipelines.cli.stage_commands import STAGES
    from vqbeam.pipelines.run import run_stages
    from vqbeam.vqvae.storage.run_folder import RunFolder

    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "source", 24)
    (folder / "source" / "apple" / "broken.png").write_bytes(b"not an image")
    config = small_config(f"folder:{folder / 'source'}", data__max_failed=0.1, sample__guidance=2.0)
    run_stages(config, str(folder / "run"), STAGES, ["--runner=FnApiRunner"])
    return RunFolder(folder / "run")


@pytest.fixture
def preset(tmp_path):
    """The path of a preset file."""
    from argument_checks import PRESET

    path = tmp_path / "own.py"
    path.write_text(PRESET)
    return str(path)


@pytest.fixture
def failure(capfd, monkeypatch, tmp_path):
    """Runs a command line that must fail; returns what it says and checks how."""
    from vqbeam.pipelines.cli import main as cli

    monkeypatch.chdir(tmp_path)  # the quickstart leaves a samples.png, which commands would mention
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)

    def run(*words, alone=True):
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        lines = err.splitlines()
        # Nothing but the one line, unless the work had begun and shows its progress.
        assert len(lines) == 1 or not alone, err
        assert "Traceback" not in err
        assert lines[-1].startswith("vqbeam"), err
        assert status == (2 if "usage" in out or "unknown" in lines[-1] else 1)
        return lines[-1]

    return run


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of a finished run, to be damaged, and the preset that it was made with."""
    import shutil

    from pipeline_fixtures import write_preset

    from vqbeam.vqvae.storage.run_folder import RunFolder

    run = RunFolder(shutil.copytree(finished_run.root, tmp_path / "run"))
    return run, write_preset(tmp_path / "preset.py", run.load_config())
