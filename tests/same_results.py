"""Records the results of the product and compares two records, to check refactorings.

    python tests/same_results.py record FOLDER              # of the checkout that this file lies in
    python tests/same_results.py compare FOLDER_A FOLDER_B  # status 1 where a result differs

With --draw-letters, `record` sees a change of the glyphs dataset as well; with --errors, `compare`
ends with status 1 where an error is worded differently, which is otherwise only noted.

Not a test: nothing here knows which results are right, only whether they are the same. So that it
outlives any move of modules, it types commands and reads files, and imports nothing of the product.

A record is two small runs, by the backend that KERAS_BACKEND names: letters, and a folder of
pictures made here, which between them take two quantizers, estimators, optimizers and dtypes. Both
records must come from machines with the same processor, since sums in another order round
otherwise. FOLDER/work keeps the finished run folders.
"""

import argparse
import concurrent.futures
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent

# All that a renaming of verbs, flags, folders or files would touch. What stands before a colon is
# the name of a result, and must stay, or records from before cannot be compared.
STARTS = ("vqbeam.py", "vqbeam/__main__.py")
MODULE = "vqbeam" if any((ROOT / path).exists() for path in STARTS) else "pipelines"
DATASETS = {"images": "images", "codes": "codes"}
MODELS = {"vqvae": "vqvae/model.keras", "prior": "prior/model.keras"}
DEAD_LETTERS = "images/dead_letters.jsonl"
ROUND, SHARP = "round", "Sharp"  # classes of the pictures; a capital sorts before all small letters
RUNS = {
    "glyphs": "run glyphs --smoke --run-dir {run} --data.data-dir {datasets}",
    "pictures": "run cifar10 --smoke --run-dir {run} --data.source folder:{work}/input"
    " --data.height 16 --data.width 16 --data.validation-share 0.3 --encode.augment flip"
    " --prior.weight-ema 0.9 --vqvae.weight-ema 0.9 --vqvae.quantizer predictive",
}
LABELS = {"glyphs": ("A", "D"), "pictures": (ROUND, SHARP)}
# The ending of an output says how it is read.
DRAWN = {
    "sample 1": "sample {run} --seed 1 --num 10 --batch-size 4 --temperature 0.7 --guidance 2"
    " --top-k 9 --output {out}.npz",
    "sample 2": "sample {run} --seed 2 --num 8 --top-p 0.8 --guidance 3"
    " --guidance-schedule linear --label {first} {last} --output {out}.npz",
    "sample 3": "sample {run} --seed 3 --num 8 --min-p 0.02 --guidance 2.5 --guidance-schedule"
    " interval --guidance-start 0.2 --guidance-end 0.8 --output {out}.npz",
    "complete": "complete {run} --input {picture} --keep top-half --num 3 --candidates 2"
    " --label {first} --seed 4 --output {out}.png",
    "interpolate": "interpolate {run} --from {first} --to {last} --steps 4 --num 2 --seed 5"
    " --guidance 3 --output {out}.png",
    "score": "score {run} --input {work}/input --label {last} --output {out}.jsonl",
    "reconstruct": "reconstruct {run} --num 6 --output {out}.png",
}
WRONG = {
    "no verb": "",
    "unknown verb": "sampel {run}",
    "unknown preset": "run glyph --run-dir {work}/new",
    "missing flag": "run glyphs",
    "unknown flag": "run glyphs --run-dir {work}/new --vqvae.num-code 3",
    "not a number": "run glyphs --run-dir {work}/new --vqvae.steps many",
    "setting out of range": "run glyphs --run-dir {work}/new --vqvae.num-codes 1",
    "settings at odds": "run glyphs --run-dir {work}/new --data.height 30 --vqvae.downsampling 8",
    "missing source": "run cifar10 --run-dir {work}/new --data.source folder:{work}/nowhere",
    "other settings": "run glyphs --smoke --run-dir {run} --data.data-dir {datasets}"
    " --vqvae.num-codes 16",
    "missing run": "sample {work}/nowhere --output {out}.npz",
    "sampler out of range": "sample {run} --top-p 1.5 --output {out}.npz",
    "unknown label": "sample {run} --label nosuch --output {out}.npz",
    "wrong ending": "reconstruct {run} --output {out}.gif",
    "unknown region": "complete {run} --input {picture} --keep middle --output {out}.png",
    "damaged picture": "complete {run} --input {damaged} --keep top-half --output {out}.png",
    "missing input": "score {run} --input {work}/nowhere",
}
# TensorFlow's Python files take longer to compile than most commands to run.
BYTECODE = f"{tempfile.gettempdir()}/same-results-{os.getuid()}"
# Taken before anything is imported that changes it.
ENVIRONMENT = os.environ | {
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": BYTECODE,
    # As in `make test`: small programs run well enough, and compile in half the time.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def record(folder: pathlib.Path, draw_letters: bool) -> None:
    """Writes FOLDER/results.npz, all that must not change, and FOLDER/texts.json, what may.

    Args:
        folder: A new folder.
        draw_letters: Whether all 28,600 letters are drawn anew. Otherwise those that an earlier
            command left in ~/tensorflow_datasets will do, and a change of how letters are drawn
            is not seen.
    """
    if folder.exists():
        sys.exit(f"{folder} is there already; give a new folder")
    work = folder.resolve() / "work"
    _make_pictures(work / "input")
    if draw_letters:
        (work / "datasets").mkdir()
    results, texts = {}, {}
    # Most of a command is one thread that imports and compiles; two at once use two cores.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found, said in pool.map(lambda kind: _record_run(kind, work), RUNS):
            results |= found
            texts |= said
    for name, command in WRONG.items():
        process = _vqbeam(command, "glyphs", work, "wrong")
        results[f"status/{name}"] = np.array(process.returncode)
        texts[f"error/{name}"] = _without_paths(process.stderr, work)
    shutil.rmtree(work / "datasets", ignore_errors=True)
    np.savez_compressed(folder / "results.npz", **results)
    (folder / "texts.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False))
    print(f"{len(results)} results, {len(texts)} texts: {folder}")


def _make_pictures(folder: pathlib.Path) -> None:
    """Writes pictures of three classes, in several shapes and modes, and one that is none."""
    random = np.random.default_rng(0)
    for name in (ROUND, SHARP, "blue"):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            coarse = Image.fromarray(random.integers(0, 256, (4, 4, 4), np.uint8), "RGBA")
            picture = coarse.resize([(16, 16), (24, 16), (20, 30)][index % 3], Image.BILINEAR)
            mode = {1: "L", 2: "RGBA"}.get(index, "RGB")
            picture.convert(mode).save(folder / name / f"{index}.png")
    (folder / "blue" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more of it")


def _vqbeam(command: str, kind: str, work: pathlib.Path, output: str):
    """Runs one command line in this checkout, to its end."""
    values = {
        "run": work / kind,
        "work": work,
        "datasets": work / "datasets" if (work / "datasets").exists() else "none",
        "out": work / "outputs" / f"{kind} {output}".replace(" ", "-"),
        "picture": work / "input" / ROUND / "0.png",
        "damaged": work / "input" / "blue" / "damaged.png",
        "first": LABELS[kind][0],
        "last": LABELS[kind][1],
    }
    # Split first: a path with a space in it stays one word.
    words = [word.format(**values) for word in shlex.split(command)]
    process = subprocess.run(
        [sys.executable, "-m", MODULE, *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if process.returncode < 0:  # a signal from elsewhere, which is no answer of the product
        sys.exit(f"signal {-process.returncode} ended {' '.join(process.args[1:])}; record anew")
    return process


def _record_run(kind: str, work: pathlib.Path) -> tuple[dict, dict]:
    """Trains one run and draws from it; returns arrays and texts by name."""
    found = {}
    for name, command in {"run": RUNS[kind], **DRAWN}.items():
        start = time.monotonic()
        process = _vqbeam(command, kind, work, name)
        print(f"{kind}: {name}, {time.monotonic() - start:.0f} s", flush=True)
        if process.returncode:
            raise SystemExit(f"{' '.join(process.args[1:])}\n{process.stderr}")
        if "{out}" in command:
            ending = command.rpartition("{out}")[2]
            path = work / "outputs" / f"{kind} {name}{ending}".replace(" ", "-")
            found |= {f"{kind}/{name}/{key}": value for key, value in _read_output(path).items()}
    for name, path in DATASETS.items():
        found |= {f"{kind}/{name}/{k}": v for k, v in _read_records(work / kind / path).items()}
    for name, path in MODELS.items():
        found |= {f"{kind}/weights/{name}/{k}": v for k, v in _weights(work / kind / path).items()}
    dead = sorted((work / kind / DEAD_LETTERS).read_text().splitlines())
    found[f"{kind}/dead letters"] = np.array(len(dead))
    return found, {f"{kind}/dead letters": _without_paths("\n".join(dead), work)}


def _read_output(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix == ".png":
        return {"pixels": np.asarray(Image.open(path))}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name] for name in ("images", "codes", "labels")}
    lines = sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["file"])
    read = [line for line in lines if "error" not in line]
    numbers = [name for name, value in read[0].items() if isinstance(value, float)]
    found = {name: np.array([line[name] for line in read]) for name in numbers}
    return found | {"files": np.array([line["file"] for line in read])}


def _read_records(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the records of a TFDS dataset, each field of a split as one array, sorted by key."""
    # Late, since comparing needs none of it.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.dont_write_bytecode, sys.pycache_prefix = False, BYTECODE
    import tensorflow_datasets as tfds

    builder, found = tfds.builder_from_directory(os.fspath(folder)), {}
    if "label" in builder.info.features:
        found["label names"] = np.array(builder.info.features["label"].names)
    for split in builder.info.splits:
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        examples.sort(key=lambda example: example["key"])
        for field in examples[0]:
            values = [example[field] for example in examples]
            values = [v.decode() for v in values] if isinstance(values[0], bytes) else values
            found[f"{split}/{field}"] = np.stack(values)
    return found


def _weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a .keras file by their path in it, in the order of a visit.

    Keras itself is not asked, which would have to import the model's classes.
    """
    import h5py

    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    content = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    with h5py.File(content) as file:
        file.visititems(visit)
    return found


def _without_paths(text: str, work: pathlib.Path) -> str:
    """Returns a text as a record and a checkout in any other folder would have it."""
    return text.strip().replace(os.fspath(work), "WORK").replace(os.fspath(ROOT), "ROOT")


def compare(a: pathlib.Path, b: pathlib.Path, errors: bool) -> int:
    """Prints every difference; returns the exit status."""
    with np.load(a / "results.npz") as old, np.load(b / "results.npz") as new:
        old, new = dict(old), dict(new)
    notes = _pair_renamed_weights(old, new)
    found = []
    for name in old | new:
        if name in old and name in new:
            found += [f"{name}: {text}" for text in _differences(old[name], new[name])]
        else:
            found.append(f"{name}: only in {a if name in old else b}")
    old, new = (json.loads((folder / "texts.json").read_text()) for folder in (a, b))
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    notes += [f"{name}:\n  - {old.get(name)}\n  + {new.get(name)}" for name in changed]
    for line in [*found, *(f"note: {note}" for note in notes)]:
        print(line)
    print(f"{len(found)} differences in results, {len(changed)} in texts")
    return int(bool(found or (errors and changed)))


def _pair_renamed_weights(old: dict, new: dict) -> list[str]:
    """Gives weights that only have another path the path of before; returns a note on each.

    The path holds names of classes and attributes, which may change, and with them the order. So
    what is only in one record goes with the first array in the other that is the same in all else.
    """
    notes = []
    for name in [name for name in new if "/weights/" in name and name not in old]:
        model = name[: re.search("/weights/[^/]*/", name).end()]
        for before in [n for n in old if n.startswith(model) and n not in new]:
            if not list(_differences(old[before], new[name])):
                new[before] = new.pop(name)
                notes.append(f"{before} is now {name.removeprefix(model)}")
                break
    return notes


def _differences(old: np.ndarray, new: np.ndarray):
    """Yields one line where two arrays are not the same, bit by bit."""
    if old.shape != new.shape or old.dtype.kind != new.dtype.kind:
        yield f"{old.dtype} {list(old.shape)} → {new.dtype} {list(new.shape)}"
    elif old.dtype.kind == "U":
        if (old != new).any():
            yield f"{old[old != new].tolist()} → {new[old != new].tolist()}"
    elif old.dtype != new.dtype or old.tobytes() != new.tobytes():
        different = old != new
        text = f"{np.count_nonzero(different)} of {old.size} numbers differ"
        if different.any():
            first = tuple(np.argwhere(different)[0])
            most = np.abs(old.astype(np.float64) - new.astype(np.float64)).max()
            text += f" by up to {most:g}, the first is {old[first]} → {new[first]}"
        yield f"{text} ({old.dtype} → {new.dtype})"


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("record", help="run this checkout, and keep what it computes")
    one.add_argument("folder", type=pathlib.Path, help="a new folder")
    one.add_argument("--draw-letters", action="store_true", help="anew, which takes a minute more")
    two = verbs.add_parser("compare", help="print what differs between two records")
    two.add_argument("folders", type=pathlib.Path, nargs=2)
    two.add_argument("--errors", action="store_true", help="status 1 where a text differs, too")
    words = parser.parse_args()
    if words.verb == "compare":
        return compare(*words.folders, words.errors)
    record(words.folder, words.draw_letters)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
