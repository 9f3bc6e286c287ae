import io
import json

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import (
    CLASSES,
    SIDE,
    TWO_THREADS,
    gathered,
    read_keys,
    read_records,
    run_transform,
    shard_contents,
    small_config,
    write_images,
)

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.run import run_stages
from vqbeam.pipelines.sources import open_source
from vqbeam.pipelines.sources.images import decode_image
from vqbeam.pipelines.stages import prepare
from vqbeam.pipelines.stages.prepare import (
    DEAD_LETTERS,
    STAGE,
    PrepareImages,
    add_facts,
    finish_images,
    plan_units,
    prepare_shard,
)
from vqbeam.vqvae.storage.run_folder import RunFolder


def save(folder, key, image, format, **options):
    data = io.BytesIO()
    image.save(data, format, **options)
    (folder / key).parent.mkdir(parents=True, exist_ok=True)
    (folder / key).write_bytes(data.getvalue())


def write_odd_images(folder):
    """Adds files of many kinds, all of which can be decoded; returns how many."""
    numbers = np.random.default_rng(1)
    colour = Image.fromarray(numbers.integers(0, 256, (17, 11, 3), np.uint8))
    deep = numbers.integers(0, 65536, (9, 13)).astype(np.uint16)
    save(folder, "apple/palette.png", colour.convert("P"), "PNG")
    save(folder, "apple/alpha.png", colour.convert("RGBA"), "PNG")
    save(folder, "cherry/deep.png", Image.fromarray(deep), "PNG")
    save(folder, "cherry/cmyk.JPG", colour.convert("CMYK"), "JPEG")
    save(folder, "cherry/gray.jpeg", colour.convert("L"), "JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6
    save(folder, "apple/turned.jpg", colour, "JPEG", exif=turned)
    return 6


BROKEN = ("apple/broken.png", "cherry/cut.jpg")


def write_broken_images(folder):
    save(folder, "cherry/cut.jpg", Image.new("RGB", (30, 30)), "JPEG")
    whole = (folder / "cherry/cut.jpg").read_bytes()
    (folder / "cherry/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "apple/broken.png").write_bytes(b"\x89PNG no more")


def start(path, source, **changes):
    run = RunFolder(path)
    run.start(small_config(source, **changes))
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_images(folder, 20)
    assert write_odd_images(folder) == 6
    write_broken_images(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """One run over whole, odd and broken files."""
    run = start(tmp_path_factory.mktemp("run"), f"folder:{folder}", data__max_failed=0.1)
    run_transform(PrepareImages(), run)
    return run


def test_every_image_is_there_once_as_decoded(prepared, folder):
    records = read_records(prepared.folder(STAGE))
    config = prepared.load_config()
    assert set(records) == {"train", "validation"}
    keys = [example["key"].decode() for some in records.values() for example in some]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert len(files) == 28
    assert sorted(keys) == sorted(files - set(BROKEN))
    assert len(set(keys)) == len(keys) == 26
    for example in (example for some in records.values() for example in some):
        key = example["key"].decode()
        expected = decode_image(
            (folder / key).read_bytes(), height=SIDE, width=SIDE, channels=3, fit="crop"
        )
        np.testing.assert_array_equal(example["image"], expected, err_msg=key)
        assert CLASSES[example["label"]] == key.partition("/")[0]
    # In the order of the source, split by split.
    planned = {"train": [], "validation": []}
    for unit in open_source(config.data).plan():
        planned[unit.shard.split] += [key for key, _ in unit.images]
    for split, some in records.items():
        in_order = [key for key in planned[split] if key in keys]
        assert [example["key"].decode() for example in some] == in_order


def test_counts_and_dead_letters(prepared):
    manifest = prepared.manifest(STAGE)
    records = read_records(prepared.folder(STAGE))
    assert manifest["counts"] == {split: len(some) for split, some in records.items()}
    assert manifest["failed"] == 2 and manifest["label_names"] == list(CLASSES)
    lines = (prepared.folder(STAGE) / DEAD_LETTERS).read_text().splitlines()
    letters = {letter["key"]: letter["reason"] for letter in map(json.loads, lines)}
    assert tuple(letters) == BROKEN and len(lines) == 2  # in the order of their names
    assert "truncated" in letters["cherry/cut.jpg"]
    assert all(reason and "\n" not in reason for reason in letters.values())


def test_colours_taken_as_they_are_are_listed(tmp_path, capsys):
    write_images(tmp_path / "in", 8)
    save(tmp_path / "in", "apple/odd.png", Image.new("RGB", (9, 9)), "PNG", icc_profile=b"odd")
    config = small_config(f"folder:{tmp_path / 'in'}", data__max_failed=0.0)
    run_stages(config, str(tmp_path / "run"), ("prepare",), ["--runner=FnApiRunner"])
    letters = tmp_path / "run" / "images" / DEAD_LETTERS
    said = capsys.readouterr().out
    assert f"\ncolours taken as they are: 1 image, listed in {letters}\n" in said
    # A folder that was meant for something else would show here.
    keys = [example["key"].decode() for example in read_records(letters.parent)["train"]]
    counts = [f"{name} {sum(key.startswith(name) for key in keys)}" for name in CLASSES]
    assert f"\nclasses, 3: {', '.join(counts)} (training images)\n" in said
    (line,) = letters.read_text().splitlines()
    assert '"key": "apple/odd.png"' in line and "the colour profile is damaged" in line
    manifest = RunFolder(tmp_path / "run").manifest(STAGE)
    assert sum(manifest["counts"].values()) == 9
    assert (manifest["failed"], manifest["noted"]) == (0, 1)


def test_statistics_in_numpy(prepared):
    records = read_records(prepared.folder(STAGE))["train"]
    scaled = np.stack([example["image"] for example in records]) / 127.5 - 1
    statistics = prepared.manifest(STAGE)["statistics"]
    assert statistics["mean"] == pytest.approx(scaled.mean(), abs=1e-9)
    assert statistics["variance"] == pytest.approx(scaled.var(), abs=1e-9)
    labels = [int(example["label"]) for example in records]
    per_label = {str(label): labels.count(label) for label in sorted(set(labels))}
    assert statistics["images_per_label"] == per_label


def test_attributes(tmp_path):
    keys = sorted(write_images(tmp_path / "source", 12))
    values = {key: (i % 2, int(i > 3), 0) for i, key in enumerate(keys)}
    rows = [",".join(map(str, (key, *row))) for key, row in values.items()]
    (tmp_path / "source" / "attributes.csv").write_text("\n".join(["path,young,hat,old", *rows]))
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    do_stage(run)
    records, manifest = read_records(run.folder(STAGE)), run.manifest(STAGE)
    found = {e["key"].decode(): e["attributes"] for some in records.values() for e in some}
    assert {key: tuple(row.tolist()) for key, row in found.items()} == values
    assert (manifest["label_names"], manifest["label_kind"]) == (
        ["young", "hat", "old"],
        "attributes",
    )
    # Images of the training split that have each; none is old.
    sums = np.sum([example["attributes"].astype(int) for example in records["train"]], axis=0)
    assert manifest["statistics"]["images_per_label"] == {"0": sums[0], "1": sums[1]}


def test_nothing_else_is_left(prepared):
    found = {path.name for path in prepared.folder(STAGE).iterdir()}
    reports = f".reports-{prepared.fingerprint(STAGE)}"
    assert found == {*prepared.manifest(STAGE)["outputs"], "manifest.json", reports}
    assert DEAD_LETTERS in found


def test_two_workers_write_the_same(prepared, tmp_path):
    other = RunFolder(tmp_path / "run")
    other.start(prepared.load_config())
    run_transform(PrepareImages(), other, *TWO_THREADS)
    one, two = (shard_contents(run.folder(STAGE)) for run in (prepared, other))
    assert one == two and len(one) >= 5
    for fact in ("outputs", "counts", "failed", "statistics", "label_names"):
        assert prepared.manifest(STAGE)[fact] == other.manifest(STAGE)[fact]


def do_stage(run):
    """The steps of the transform without Beam, for what they raise."""
    shards = [prepare_shard(*planned) for planned in plan_units(str(run.root))]
    finish_images(str(run.root), gathered(add_facts, shards))


def test_too_many_failures_end_the_stage_until_they_are_mended(tmp_path):
    folder = tmp_path / "source"
    write_images(folder, 20)
    write_broken_images(folder)
    run = start(tmp_path / "run", f"folder:{folder}", data__max_failed=0.015)
    message = (
        r"^2 of 22 images could not be decoded, more than --data.max-failed \(1.5%\) allows; fix "
        r"them, or allow more, and run it again; the first is apple/broken.png \(.*\), all are in "
        r".*/dead_letters.jsonl$"
    )
    with pytest.raises(VqbeamError, match=message):
        do_stage(run)
    assert run.manifest(STAGE) is None
    letters = (run.folder(STAGE) / DEAD_LETTERS).read_text().splitlines()
    assert len(letters) == 2
    whole = (folder / "Banana" / "000.png").read_bytes()
    for key in BROKEN:
        (folder / key).write_bytes(whole)
    do_stage(run)
    assert run.manifest(STAGE)["failed"] == 0
    assert sum(run.manifest(STAGE)["counts"].values()) == 22


def test_more_failures_are_allowed_afterwards(tmp_path, monkeypatch):
    write_images(tmp_path / "source", 20)
    write_broken_images(tmp_path / "source")
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    with pytest.raises(VqbeamError, match="2 of 22 images could not be decoded"):
        do_stage(run)
    config = small_config(f"folder:{tmp_path / 'source'}", data__max_failed=0.2)
    run.start(config)
    # What is written stays: only what could not be decoded is looked at again.
    encoded = []
    monkeypatch.setattr(prepare, "encode_png", encoded.append)
    do_stage(run)
    assert not encoded
    assert run.manifest(STAGE)["failed"] == 2
    assert sum(run.manifest(STAGE)["counts"].values()) == 20
    assert {path.name for path in run.folder(STAGE).iterdir()} == {
        *run.manifest(STAGE)["outputs"],
        f".reports-{run.fingerprint(STAGE)}",
        "manifest.json",
    }


def test_a_file_that_cannot_be_read_is_a_dead_letter(tmp_path, monkeypatch):
    # Tests may run as root, who may read all.
    pixels = write_images(tmp_path / "source", 20)
    lost = sorted(pixels)[3]
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}", data__max_failed=0.1)
    path = type(run.root)
    read_bytes = path.read_bytes

    def refuse(self):
        if self.as_posix().endswith(lost):
            raise PermissionError(13, "Permission denied", str(self))
        return read_bytes(self)

    monkeypatch.setattr(path, "read_bytes", refuse)
    do_stage(run)
    (letter,) = (run.folder(STAGE) / DEAD_LETTERS).read_text().splitlines()
    reason = "the file cannot be read: Permission denied"
    assert json.loads(letter) == {"key": lost, "reason": reason}
    assert sorted(read_keys(run.folder(STAGE))) == sorted(set(pixels) - {lost})


def test_classes_that_came_meanwhile(tmp_path):
    pixels = write_images(tmp_path / "source", 23)
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    run.begin(STAGE)
    units = open_source(run.load_config().data).plan()
    first = prepare_shard(str(run.root), units[0])[1]
    # The last by name: the numbers of the others stay, and so may the images of a shard.
    (tmp_path / "source" / "zebra").mkdir()
    whole = (tmp_path / "source" / "Banana" / "000.png").read_bytes()
    (tmp_path / "source" / "zebra" / "new.png").write_bytes(whole)
    same = units[0]._replace(labels=open_source(run.load_config().data).plan()[0].labels)
    again = prepare_shard(str(run.root), same)[1]
    assert first.facts["labels"][0] == CLASSES
    assert again.facts["labels"][0] == (*CLASSES, "zebra")
    do_stage(run)
    assert run.manifest(STAGE)["label_names"] == [*CLASSES, "zebra"]
    assert sorted(read_keys(run.folder(STAGE))) == sorted([*pixels, "zebra/new.png"])


@pytest.mark.slow
def test_an_engine_that_begins_again_leaves_a_finished_stage_alone(tmp_path):
    write_images(tmp_path / "source", 20)
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    run_transform(PrepareImages(), run)
    manifest = run.manifest(STAGE)
    (tmp_path / "source" / "apple" / "new.png").write_bytes(b"came later")
    run_transform(PrepareImages(), run)
    assert run.manifest(STAGE) == manifest


def test_killed_after_the_manifest(tmp_path, monkeypatch):
    # What is left over is removed last, and what was killed before that is done.
    write_images(tmp_path / "source", 20)
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "remove_leftovers", killed)
        with pytest.raises(KeyboardInterrupt):
            do_stage(run)
    assert run.is_done(STAGE)


def test_a_shard_of_which_nothing_is_left(tmp_path):
    folder = tmp_path / "source"
    write_images(folder, 20)
    write_broken_images(folder)
    config = {"data__images_per_shard": 1, "data__max_failed": 0.5}
    run = start(tmp_path / "run", f"folder:{folder}", **config)
    do_stage(run)
    records = read_records(run.folder(STAGE))
    assert sum(map(len, records.values())) == 20
    assert len(shard_contents(run.folder(STAGE))) == 22


@pytest.mark.parametrize(("split", "purpose"), [("train", "train on"), ("validation", "hold out")])
def test_a_split_of_which_nothing_is_left(tmp_path, split, purpose):
    folder = tmp_path / "source"
    write_images(folder, 8)
    run = start(
        tmp_path / "run",
        f"folder:{folder}",
        data__max_failed=1.0,
        data__validation_share=0.5,
    )
    for unit in open_source(run.load_config().data).plan():
        if unit.shard.split == split:
            for key, _ in unit.images:
                (folder / key).write_bytes(b"nothing")
    with pytest.raises(VqbeamError, match=f"has no image to {purpose} that could be decoded"):
        do_stage(run)
    assert run.manifest(STAGE) is None


def test_without_an_image_to_hold_out(tmp_path):
    write_images(tmp_path / "source", 8)
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}", data__validation_share=0.0)
    with pytest.raises(VqbeamError, match="no image to hold out; set data.validation_share"):
        list(plan_units(str(run.root)))


def test_goes_on_after_a_kill_though_files_were_added(tmp_path):
    folder = tmp_path / "source"
    pixels = write_images(folder, 23)
    run = start(tmp_path / "run", f"folder:{folder}")
    run.begin(STAGE)
    units = open_source(run.load_config().data).plan()
    for unit in units[:3]:
        prepare_shard(str(run.root), unit)
    # As many shards as before, of which some hold other images now.
    extra = folder / "apple" / "new.png"
    extra.write_bytes((folder / "Banana" / "000.png").read_bytes())
    assert len(open_source(run.load_config().data).plan()) == len(units)
    do_stage(run)
    records = read_records(run.folder(STAGE))
    keys = [example["key"].decode() for some in records.values() for example in some]
    assert sorted(keys) == sorted([*pixels, "apple/new.png"])


def test_the_last_step_may_be_done_twice(tmp_path):
    write_images(tmp_path / "source", 8)
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    run.begin(STAGE)
    units = open_source(run.load_config().data).plan()
    reports = gathered(add_facts, [prepare_shard(str(run.root), unit) for unit in units])
    finish_images(str(run.root), reports)
    manifest = run.manifest(STAGE)
    assert finish_images(str(run.root), reports) == str(run.root)
    # The very same: what was made from it would be out of date otherwise.
    assert run.manifest(STAGE) == manifest and run.is_done(STAGE)


def test_flat_images_have_variance_one(tmp_path):
    for index in range(4):
        save(tmp_path / "source", f"{index}.png", Image.new("RGB", (8, 8), "gray"), "PNG")
        with (tmp_path / "source" / f"{index}.png").open("ab") as file:
            file.write(bytes([index]))  # behind the image, so that no file is a copy of another
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    do_stage(run)
    assert run.manifest(STAGE)["statistics"]["variance"] == 1.0
    assert "label" not in read_records(run.folder(STAGE))["train"][0]


def test_a_file_in_the_way(tmp_path):
    write_images(tmp_path / "source", 4)
    run = start(tmp_path / "run", f"folder:{tmp_path / 'source'}")
    run.folder(STAGE).write_text("a file where the folder should be")
    with pytest.raises(Exception, match="File exists: .*images"):
        run_transform(PrepareImages(), run)


@pytest.mark.slow
def test_what_is_left_out_is_part_of_the_result_but_not_of_its_hash(tmp_path):
    def prepared(name):
        run = RunFolder(tmp_path / name)
        run.start(small_config(f"folder:{tmp_path / 'source'}"))
        run_transform(PrepareImages(), run)
        return run.require(STAGE)

    write_images(tmp_path / "source", 12)
    (tmp_path / "source" / "apple" / "notes.txt").write_text("")
    one = prepared("one")
    assert one["left_out"] == {"files that end in .txt": 1}
    (tmp_path / "source" / "apple" / "notes.txt").unlink()
    other = prepared("other")
    assert other["left_out"] == {} and one["sha256"] == other["sha256"]
    assert not (tmp_path / "one" / "images" / ".left_out").exists()
