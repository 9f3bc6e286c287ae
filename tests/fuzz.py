"""Gives vqbeam what others may have damaged or forged, and looks for tracebacks, hangs and memory.

    python tests/fuzz.py --minutes 10
    python tests/fuzz.py --only images --seed 17      # one case again

A case is the name of a target and a seed, which decide all of it. It fails if anything else than a
message of one line comes out, after 10 seconds of computing or 100 in all, since the machine may do
other things as well, or above 2 GB of memory. Cases run in processes of their own, some
hundred in each, so that one that ends its process is found by its number.
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import os
import pathlib
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from etils import epath  # noqa: E402
from PIL import Image  # noqa: E402

from vqbeam.configs import DataConfig, VqbeamError  # noqa: E402
from vqbeam.pipelines.sources.images import FORMATS, ImageError, decode_image  # noqa: E402

COMPUTING_SECONDS, SECONDS, MOST_BYTES = 10, 100, 2 * 2**30
BASES = 200  # files of each format, of which the cases are made
CASES_IN_A_PROCESS = 100

# Cases that have failed once, and were mended.
FOUND = [("run_folders", 145), ("run_folders", 205)]


def base_image(format: str, number: int) -> bytes:
    """Returns file `number` of a format: images of several modes, sizes and options."""
    numbers = np.random.default_rng([number, FORMATS.index(format)])
    height, width = numbers.integers(1, 40, 2)
    image = Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8))
    modes = {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "BMP": ("RGB", "L", "P", "1"),
        "GIF": ("P", "L"),
        "TIFF": ("RGB", "RGBA", "L", "CMYK", "F", "I;16", "1"),
    }.get(format, ("RGB", "RGBA"))
    mode = modes[number % len(modes)]
    match mode:
        case "I;16":
            image = image.convert("L").convert("I").convert(mode)
        case "F":
            image = Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
        case _:
            image = image.convert(mode)
    options = {}
    if format == "TIFF" and mode not in ("F", "I;16"):
        options["compression"] = (None, "tiff_lzw", "tiff_deflate", "packbits")[number % 4]
    if format in ("JPEG", "PNG", "WEBP") and number % 3 == 0:
        exif = Image.Exif()
        exif[0x0112] = int(numbers.integers(0, 10))
        options["exif"] = exif
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def mutated(data: bytes, numbers: np.random.Generator) -> bytes:
    """Returns bytes with some changes: of bits, of numbers, cut, doubled, moved."""
    data = bytearray(data)
    for _ in range(numbers.integers(1, 6)):
        if not data:
            break
        at = int(numbers.integers(len(data)))
        length = int(numbers.integers(1, 33))
        match numbers.integers(7):
            case 0:
                data[at] ^= 1 << int(numbers.integers(8))
            case 1:
                data[at : at + 4] = struct.pack(
                    ("<I", ">I")[numbers.integers(2)],
                    (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16)[numbers.integers(6)],
                )
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * int(numbers.integers(1, 4))
            case 5:
                data[at : at + length] = numbers.bytes(length)
            case 6:
                other = int(numbers.integers(len(data)))
                data[at : at + length] = data[other : other + length]
    return bytes(data)


ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**70,
    1.5,
    1e400,
    float("nan"),
    "",
    "x",
    "\x1b[31m",
    "é" * 99,
]
ODD += [[], {}, [[]], [None], {"": {}}, [0] * 99, "../../etc/passwd", "\ud800"]


def mutated_json(value, numbers: np.random.Generator):
    """Returns JSON in which some values, at any depth, are others, are missing, or are new."""
    if numbers.random() < 0.08:
        return ODD[numbers.integers(len(ODD))]
    if isinstance(value, dict):
        found = {
            key: mutated_json(of, numbers) for key, of in value.items() if numbers.random() > 0.02
        }
        return found | ({"new": ODD[numbers.integers(len(ODD))]} if numbers.random() < 0.05 else {})
    if isinstance(value, list):
        return [mutated_json(of, numbers) for of in value]
    return value


def json_bytes(value, numbers: np.random.Generator) -> bytes:
    """Returns mutated JSON; in some cases its bytes are mutated as well, or nested deeply."""
    data = json.dumps(mutated_json(value, numbers)).encode()
    match numbers.integers(10):
        case 0:
            return mutated(data, numbers)
        case 1:
            return b"[" * 10**5
    return data


@contextlib.contextmanager
def one_line(*allowed: type[Exception]):
    """Lets errors pass that are a single line for the user."""
    try:
        yield
    except (VqbeamError, *allowed) as error:
        assert "\n" not in str(error) and len(str(error)) < 5000, error


def images(numbers: np.random.Generator, folder: pathlib.Path) -> None:
    """An image file of any format."""
    format = FORMATS[numbers.integers(len(FORMATS))]
    data = mutated(base_image(format, int(numbers.integers(BASES))), numbers)
    with one_line(ImageError):
        found = decode_image(
            data, height=8, width=12, channels=(1, 3)[numbers.integers(2)], fit="pad"
        )
        assert found.dtype == np.uint8 and found.shape[:2] == (8, 12)


def _tiny_config():
    from pipeline_fixtures import small_config

    return small_config("glyphs")


def png_texts(numbers: np.random.Generator, folder: pathlib.Path) -> None:
    """A PNG or an archive with settings of its images, for --like and complete."""
    from vqbeam.configs import SampleConfig
    from vqbeam.pipelines.sampling.input_images import read_image
    from vqbeam.pipelines.sampling.sample import read_provenance
    from vqbeam.vqvae.figures import save_png

    facts = {"preset": "p", "checkpoint": "0123", "seed": 3, **vars(SampleConfig())}
    facts["images"] = [{"index": i, "label": i % 3, "name": "a"} for i in range(4)]
    text = json_bytes(facts, numbers)
    path = folder / ("a.png", "a.npz")[numbers.integers(2)]
    if path.suffix == ".png":
        text = text.decode("latin-1").replace("\0", "?")
        save_png(Image.new("RGB", (32, 32)), epath.Path(path), {"vqbeam": text})
    else:
        pixels = np.zeros((4, 8, 8, 3), np.uint8)
        np.savez(path, images=pixels, vqbeam=np.array(text.decode("latin-1")))
    if numbers.random() < 0.3:
        path.write_bytes(mutated(path.read_bytes(), numbers))
    with one_line():
        read_provenance(epath.Path(path))
    with one_line():
        read_image(epath.Path(path), _tiny_config())


def locks(numbers: np.random.Generator, folder: pathlib.Path) -> None:
    """The lock of a folder."""
    from vqbeam.pipelines import lock

    lock._SECONDS_TO_BE_DEAD = lock._SECONDS_BETWEEN_LOOKS = 0.01
    lease = {"host": "h", "pid": 7, "kernel": "k", "token": "t", "signs": 4}
    (folder / lock.LOCK_FILE).write_bytes(json_bytes(lease, numbers))
    with one_line(), contextlib.redirect_stderr(io.StringIO()):
        with lock.locked(epath.Path(folder), "--run-dir"):
            pass


def _finished_run(folder: pathlib.Path):
    from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

    run = RunFolder(folder / "run")
    run.start(_tiny_config())
    epoch = {"loss": 1.0, "val_loss": 2.0}
    names = ("mse", "psnr", "reconstruction", "perplexity", "codes_used", "nats_per_code")
    facts = {"counts": {"train": 3, "validation": 1}, "failed": 0, "history": [epoch]}
    facts |= {"measures": dict.fromkeys((*names, "bits_per_dim"), 0.5), "parameters": 9}
    facts |= {"perplexity": 2.0, "codes_used": 3, "settings": {}, "label_names": ["a", "b"]}
    for stage in STAGES:
        run.begin(stage)
        output = run.folder(stage) / "output"
        output.write_text("whole")
        run.finish(stage, [output], **facts, label_kind="classes")
    return run


def run_folders(numbers: np.random.Generator, folder: pathlib.Path) -> None:
    """The JSON of a run: config, manifests with a wrong and a right hash, and sampler settings."""
    from vqbeam.pipelines.inspect import describe
    from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, _hash_of

    run = _finished_run(folder)
    stage = list(STAGES)[numbers.integers(len(STAGES))]
    manifest = run.folder(stage) / MANIFEST
    path = (run.root / "config.json", manifest, run.root / "sample.json")[numbers.integers(3)]
    values = json.loads(path.read_text()) if path.exists() else vars(run.load_config().sample)
    if path == manifest and numbers.random() < 0.5:
        # Only whole entries: what is in them, only a forger could have changed.
        changed = values | {
            list(values)[numbers.integers(len(values))]: ODD[numbers.integers(len(ODD))]
        }
        data = json.dumps(changed | {"sha256": _hash_of(changed)}).encode()
    else:
        data = json_bytes(values, numbers)
    path.write_bytes(data)
    with one_line():
        run.load_config()
    for look in (run.done, run.is_stale, run.require, run.trained_steps):
        with one_line():
            look(STAGES if look == run.done else stage)
    with one_line():
        run.start(_tiny_config())
    with contextlib.suppress(VqbeamError):
        assert describe(str(run.root))
    with one_line():
        import vqbeam

        vqbeam.open(run.root).default_settings()


def checkpoints(numbers: np.random.Generator, folder: pathlib.Path) -> None:
    """The file of a checkpoint, as the history of a training is read from it."""
    import h5py

    from vqbeam.vqvae.fitting.checkpoints import stored_history

    own = folder / "checkpoints" / "f"
    own.mkdir(parents=True)
    file = own / "step-00000002.weights.h5"
    history = [{"loss": 1.0, "val_loss": 2.0}] * 3
    with h5py.File(file, "w") as content:
        text = np.frombuffer(json_bytes(history, numbers), np.uint8)
        content.create_group("vqbeam")["history"] = text
    if numbers.random() < 0.5:
        file.write_bytes(mutated(file.read_bytes(), numbers))
    (own / ODD_NAMES[numbers.integers(len(ODD_NAMES))]).write_bytes(b"")
    assert isinstance(stored_history(epath.Path(folder), 2), list)


ODD_NAMES = [
    "step-x.weights.h5",
    "step-.weights.h5",
    ".DS_Store",
    "step-00000009.weights.h5",
    "a b",
]
NAMES = ["a.png", "b.JPG", "c.gif", "d.txt", "e", "f.jfif", " g.png", "h\n.png", "i.webp", ".j.png"]
PARTS = ["", "cat", "dog ", "train", "val", "test", "ca\nt", ".hidden", "deep/er", "é", "runs/one"]


def folders(numbers: np.random.Generator, folder: pathlib.Path) -> None:
    """A folder of images, among which are other things."""
    from vqbeam.pipelines.sources.folder import FolderSource

    for _ in range(numbers.integers(0, 12)):
        path = (
            folder
            / "in"
            / PARTS[numbers.integers(len(PARTS))]
            / NAMES[numbers.integers(len(NAMES))]
        )
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):  # a pipe, which would be written to
                _make(path, numbers)
    if numbers.random() < 0.2:
        (folder / "in").mkdir(exist_ok=True)
        table = "path,young,old\na.png,1,0\nb.JPG,0,1\n" * 3
        (folder / "in" / "attributes.csv").write_bytes(mutated(table.encode(), numbers))
    source = FolderSource(DataConfig(source=f"folder:{folder / 'in'}", height=4, width=4))
    with one_line(), contextlib.redirect_stdout(io.StringIO()):
        source.check()
        source.download([])
        for unit in source.plan():
            for raw in source.read(unit):
                with contextlib.suppress(ImageError):
                    source.decode(raw)


def _make(path: pathlib.Path, numbers: np.random.Generator) -> None:
    """Makes one of many things at a path."""
    match numbers.integers(10):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(path)
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.parent)
        case 4:
            path.mkdir()
        case 5:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
                one.bind(str(path))
        case 6:
            with path.open("wb") as file:
                file.truncate(2**31)
        case 7:
            os.close(os.open(os.fsencode(path) + b"\xff.png", os.O_CREAT | os.O_WRONLY))
        case _:
            path.write_bytes(base_image("PNG", int(numbers.integers(5))))


TARGETS = {
    function.__name__: function
    for function in (images, png_texts, locks, run_folders, checkpoints, folders)
}


def run_case(target: str, seed: int) -> None:
    """Runs a case; raises what comes out of it."""
    numbers = np.random.default_rng([seed, list(TARGETS).index(target)])
    # Of this process, in which other tests may have run before.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.register(signal.SIGPROF, chain=True)  # which then ends the process
    signal.setitimer(signal.ITIMER_PROF, COMPUTING_SECONDS)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[target](numbers, pathlib.Path(folder))
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
    added = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert added < MOST_BYTES, f"{added / 2**30:.1f} GiB of memory"


def load() -> None:
    """Imports what the targets need, which takes longer than a case may."""
    import h5py  # noqa: F401

    import vqbeam.pipelines.sampling.sample  # noqa: F401


def run_cases(target: str, first: int, count: int) -> None:
    """Runs cases and prints each seed before; at the end, the largest memory in MiB."""
    import warnings

    warnings.simplefilter("ignore")
    load()
    for seed in range(first, first + count):
        print(seed, flush=True)
        run_case(target, seed)
    print("most", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)


def main() -> int:
    """Runs rounds of all targets until the time is over; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    parser.add_argument("--only", choices=TARGETS, help="a single target")
    parser.add_argument("--seed", type=int, help="a single case")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--cases", nargs=3, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.cases:
        run_cases(words.cases[0], *map(int, words.cases[1:]))
        return 0
    if words.seed is not None:
        load()
        run_case(words.only, words.seed)
        return 0
    targets = [words.only] if words.only else list(TARGETS)
    first, end, failed = words.first, time.monotonic() + 60 * words.minutes, []
    done, memory = collections.Counter(), collections.Counter()
    while time.monotonic() < end:
        for target in targets:
            seed = first
            while seed < first + CASES_IN_A_PROCESS:
                count = first + CASES_IN_A_PROCESS - seed
                command = [sys.executable, __file__, "--cases", target, str(seed), str(count)]
                ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
                lines = ran.stdout.split("\n")
                seeds = [int(line) for line in lines if line.isdecimal()]
                done[target] += len(seeds)
                if ran.returncode == 0:
                    memory[target] = max(memory[target], int(lines[-2].split()[1]))
                    break
                failed.append((target, seeds[-1] if seeds else seed))
                print(f"{failed[-1]}: status {ran.returncode}\n{ran.stderr[-3000:]}", flush=True)
                seed = failed[-1][1] + 1
        first += CASES_IN_A_PROCESS
    for target in targets:
        print(f"{target}: {done[target]:,} cases, at most {memory[target]} MiB")
    print(f"failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
