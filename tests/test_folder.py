import contextlib
import dataclasses
import errno
import os
import socket

import pytest

from vqbeam.configs import DataConfig, VqbeamError
from vqbeam.pipelines.sources import folder
from vqbeam.vqvae.storage import files
from vqbeam.vqvae.storage.labels import NO_CLASS


def _fill(root, keys):
    for key in keys:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _list(root, validation_share=0.25, max_images=None):
    return folder.list_folder(str(root), validation_share=validation_share, max_images=max_images)


def _keys(listing, split):
    return [key for key, _ in listing.splits[split]]


def test_subfolders_are_classes(tmp_path):
    _fill(tmp_path, ["dog/1.png", "cat/deep/2.JPG", "cat/3.webp", "ant/4.tiff"])
    listing = _list(tmp_path, validation_share=0)
    assert listing.labels == (("ant", "cat", "dog"), "classes")
    assert dict(listing.splits["train"]) == {
        "ant/4.tiff": 0,
        "cat/3.webp": 1,
        "cat/deep/2.JPG": 1,
        "dog/1.png": 2,
    }
    assert listing.splits["validation"] == []


def test_flat_folder_has_no_labels(tmp_path):
    _fill(tmp_path, ["1.png", "2.Jpeg"])
    listing = _list(tmp_path, validation_share=0)
    assert listing.labels == ((), "classes")
    assert dict(listing.splits["train"]) == {"1.png": NO_CLASS, "2.Jpeg": NO_CLASS}


def test_a_table_of_attributes(tmp_path):
    _fill(tmp_path, ["1.png", "deep/2.png"])
    (tmp_path / "attributes.csv").write_text("path,young,hat\n1.png,1,0\ndeep/2.png,1,1\n3.png,0,0")
    listing = _list(tmp_path, validation_share=0)
    assert listing.labels == (("young", "hat"), "attributes")
    assert dict(listing.splits["train"]) == {"1.png": (1, 0), "deep/2.png": (1, 1)}
    _fill(tmp_path, ["4.png"])
    with pytest.raises(VqbeamError, match="attributes.csv has no row for '4.png'; add one"):
        _list(tmp_path)


def test_only_visible_images_count(tmp_path):
    _fill(
        tmp_path, ["a/1.png", "a/.2.png", ".b/3.png", "a/.c/4.png", "a/5.txt", "a/png", "note.md"]
    )
    assert _keys(_list(tmp_path, validation_share=0), "train") == ["a/1.png"]


def left_out(root, **changes):
    source = folder.FolderSource(DataConfig(source=f"folder:{root}", **changes))
    units = source.plan()
    return {what: n for what, n in source.left_out.items() if n}, units


def test_what_is_left_out_is_counted(tmp_path):
    _fill(
        tmp_path, ["a/1.png", "a/2.png", "a/5.txt", "a/6.TXT", "a/7.psd", "a/Makefile", "a/.8.png"]
    )
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "attributes.csv").write_text("path,young\na/1.png,1\na/2.png,0")
    # A run in the folder that it reads from.
    _fill(tmp_path, ["runs/one/config.json", "runs/one/images/shard", "runs/one/vqvae/recon.png"])
    found, units = left_out(tmp_path)
    assert sum(len(unit.images) for unit in units) == 2
    assert found == {
        "files that end in .txt": 2,
        "files that end in .psd": 1,
        "files without ending": 1,
        "linked folders": 1,
        "folders of runs": 1,
    }


def test_another_split_is_counted_as_left_out(tmp_path):
    _fill(tmp_path, ["train/1.png", "val/2.png", "test/3.png", "test/4.png"])
    assert left_out(tmp_path)[0] == {"images of other splits": 2}


def test_copies_are_kept_on_the_side_of_training(tmp_path):
    _fill(tmp_path, [f"{index}.png" for index in range(40)])
    for index in range(40):
        (tmp_path / f"{index}.png").write_bytes(b"image %02d" % index)
    _, whole = left_out(tmp_path, validation_share=0.25)
    sides = {unit.shard.split: [key for key, _ in unit.images] for unit in whole}
    one, two, other = *sides["validation"][:2], sides["train"][0]
    content = (tmp_path / other).read_bytes()
    (tmp_path / one).write_bytes(content)
    (tmp_path / two).write_bytes(content[::-1])  # of the same size alone
    found, units = left_out(tmp_path, validation_share=0.25)
    assert found == {"held-out images that are copies of training images": 1}
    kept = {unit.shard.split: [key for key, _ in unit.images] for unit in units}
    assert kept["train"] == sides["train"]
    assert kept["validation"] == [key for key in sides["validation"] if key != one]
    for key in sides["validation"]:
        (tmp_path / key).write_bytes(content)
    with pytest.raises(VqbeamError, match="has no image to hold out that is not trained on"):
        left_out(tmp_path, validation_share=0.25)


@pytest.mark.parametrize("suffix", folder.SUFFIXES)
def test_every_suffix_counts_in_both_cases(tmp_path, suffix):
    _fill(tmp_path, ["1" + suffix, "2" + suffix.upper()])
    assert len(_list(tmp_path, validation_share=0).splits["train"]) == 2


def test_splits_have_their_shares_and_share_nothing(tmp_path):
    keys = [f"{index}.png" for index in range(2000)]
    _fill(tmp_path, keys)
    listing = _list(tmp_path)
    train, validation = _keys(listing, "train"), _keys(listing, "validation")
    assert sorted(train + validation) == sorted(keys)
    # Four standard deviations of a binomial: 4 · sqrt(2000 · 0.25 · 0.75) = 77.
    assert abs(len(validation) - 500) < 77


def test_split_and_order_never_change(tmp_path):
    # By hashlib.blake2b(key, digest_size=6): 2.png 0.119, 4.png 0.137, ..., 7.png 0.915.
    _fill(tmp_path, [f"{index}.png" for index in range(8)])
    listing = _list(tmp_path, 0.25)
    assert _keys(listing, "validation") == ["2.png", "4.png", "6.png"]
    assert _keys(listing, "train") == ["0.png", "1.png", "3.png", "5.png", "7.png"]


def test_adding_images_moves_none(tmp_path):
    _fill(tmp_path, [f"{index}.png" for index in range(200)])
    before = _list(tmp_path)
    _fill(tmp_path, [f"{index}.png" for index in range(200, 400)])
    after = _list(tmp_path)
    for split in ("train", "validation"):
        old = set(_keys(before, split))
        # Neither the split nor the order of the old images changes.
        assert [key for key in _keys(after, split) if key in old] == _keys(before, split)


def test_any_prefix_is_a_fair_mixture(tmp_path):
    _fill(tmp_path, [f"{name}/{index}.png" for name in "abcd" for index in range(250)])
    labels = [label for _, label in _list(tmp_path, 0.1, max_images=200).splits["train"]]
    assert len(labels) == 200
    assert all(30 <= labels.count(label) <= 70 for label in range(4))


def test_max_images_limits_each_split_to_its_first(tmp_path):
    _fill(tmp_path, [f"{index}.png" for index in range(100)])
    everything, some = _list(tmp_path), _list(tmp_path, max_images=5)
    for split in ("train", "validation"):
        assert some.splits[split] == everything.splits[split][:5]
        assert len(some.splits[split]) == 5


@pytest.mark.parametrize("share", [0.001, 0.9])
@pytest.mark.parametrize("count", [2, 3])
def test_both_splits_get_an_image(tmp_path, share, count):
    for trial in range(20):
        _fill(tmp_path / str(trial), [f"{trial}-{index}.png" for index in range(count)])
        splits = _list(tmp_path / str(trial), share).splits
        assert splits["train"] and splits["validation"]


def test_a_single_image_is_for_training(tmp_path):
    for trial in range(20):
        _fill(tmp_path / str(trial), [f"{trial}.png"])
        splits = _list(tmp_path / str(trial), 0.9).splits
        assert len(splits["train"]) == 1 and not splits["validation"]


def test_no_such_folder(tmp_path):
    with pytest.raises(VqbeamError, match="there is no folder '.*missing'"):
        _list(tmp_path / "missing")


def test_a_file_is_not_a_folder(tmp_path):
    _fill(tmp_path, ["1.png"])
    with pytest.raises(VqbeamError, match="there is no folder"):
        _list(tmp_path / "1.png")


def test_folder_without_images(tmp_path):
    _fill(tmp_path, ["a/1.txt", ".2.png"])
    with pytest.raises(VqbeamError, match=r"holds no image; .* \.jpg \.jpeg \.jfif \.png"):
        _list(tmp_path)


def test_images_at_the_top_and_in_subfolders(tmp_path):
    _fill(tmp_path, ["1.png", "a/2.png", "b/3.png"])
    with pytest.raises(VqbeamError, match=r"1 images at the top \(such as '1.png'\) and 2 in subf"):
        _list(tmp_path)


def test_unreadable_subfolder_is_not_left_out(tmp_path, monkeypatch):
    _fill(tmp_path, ["a/1.png", "b/2.png"])
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(VqbeamError, match="cannot be read .*Permission denied"):
        _list(tmp_path)


def test_name_that_is_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    with pytest.raises(VqbeamError, match="not valid UTF-8; rename it"):
        _list(tmp_path)


TREE = ["Train/cat/1.png", "Train/cat/2.png", "Train/dog/3.png", "val/cat/4.png", "val/emu/5.png"]


def test_subfolders_can_be_splits(tmp_path):
    _fill(tmp_path, [*TREE, "test/dog/6.png"])
    listing = _list(tmp_path)
    assert listing.labels.names == ("cat", "dog", "emu")
    assert sorted(listing.splits["train"]) == [
        ("Train/cat/1.png", 0),
        ("Train/cat/2.png", 0),
        ("Train/dog/3.png", 1),
    ]
    assert sorted(listing.splits["validation"]) == [("val/cat/4.png", 0), ("val/emu/5.png", 2)]
    assert len(_list(tmp_path, max_images=1).splits["train"]) == 1


def test_splits_without_classes(tmp_path):
    _fill(tmp_path, ["training/1.png", "training/2.png", "test/3.png"])
    listing = _list(tmp_path)
    assert listing.labels.names == () and len(listing.splits["train"]) == 2
    assert listing.splits["validation"] == [("test/3.png", NO_CLASS)]


@pytest.mark.parametrize(
    "keys",
    [
        [*TREE, "cat/7.png"],  # a class beside them
        ["train/cat/1.png", "bus/2.png"],  # a class called "train"
        ["val/cat/1.png", "test/cat/2.png"],  # nothing to train on
        ["train/cat/1.png", "training/cat/2.png", "val/cat/3.png"],  # which one?
    ],
)
def test_other_folders_are_classes_whatever_their_names(keys):
    assert folder.splits_at_top(keys) == {}


def test_a_flag_makes_such_folders_classes(tmp_path, capsys):
    _fill(tmp_path, TREE)
    data = DataConfig(source=f"folder:{tmp_path}")
    folder.FolderSource(data).download([])
    assert "trained on Train/, held out val/" in capsys.readouterr().out
    source = folder.FolderSource(dataclasses.replace(data, train_split="none"))
    source.download([])
    assert capsys.readouterr().out == ""
    splits, labels = source.listing()
    assert labels.names == ("Train", "val")
    assert sorted(len(images) for images in splits.values()) == [1, 4]


def test_only_regular_files_of_a_sane_size_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 2**20)
    (tmp_path / "good.png").write_bytes(b"bytes")
    os.mkfifo(tmp_path / "pipe.png")  # would be waited for without end
    (tmp_path / "device.png").symlink_to("/dev/zero")  # would fill the memory
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**20 + 1)
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind("socket.png")
    source = folder.FolderSource(DataConfig(source=f"folder:{tmp_path}", validation_share=0.3))
    found = {raw.key: raw.data for unit in source.plan() for raw in source.read(unit)}
    assert found.pop("good.png") == b"bytes"
    assert {key: error.strerror for key, error in found.items()} == {
        "pipe.png": "not a regular file",
        "device.png": "not a regular file",
        "socket.png": "not a regular file",
        "loop.png": os.strerror(errno.ELOOP),
        "gone.png": os.strerror(errno.ENOENT),
        "huge.png": "larger than 1 MiB",
    }
