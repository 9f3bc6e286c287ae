import json
import os
import sys
import threading
import time

import pytest
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage import files
from vqbeam.vqvae.storage.files import (
    matching,
    modified,
    read_json,
    read_regular,
    size,
    sizes,
    write_bytes,
    write_json,
)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def test_files_are_written_whole_or_not_at_all(folder, monkeypatch):
    path = folder / "file.json"
    write_json(path, {"name": "größe"})
    assert json.loads(path.read_text()) == {"name": "größe"} and "größe" in path.read_text()
    before = {p.name for p in folder.iterdir()}

    def interrupted(self, target):
        # At this moment the new content is under a name that begins with a dot.
        assert target == path
        assert self.name.startswith(".file.json.") and self.read_bytes() == b"new"
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"name": "größe"}
    assert {p.name for p in folder.iterdir()} == before


def test_json_that_is_none(folder):
    (folder / "file.json").write_text("{")
    with pytest.raises(
        VqbeamError, match="file.json is not valid JSON .* by hand, or is damaged; restore it"
    ):
        read_json(folder / "file.json")


def test_size(folder):
    (folder / "file").write_bytes(b"12345")
    assert size(folder / "file") == 5
    assert size(folder / "other") is None
    assert size(folder / "file" / "below") is None
    assert sizes([folder / "other", folder / "file"] * 40) == [None, 5] * 40


def test_a_file_that_is_waited_for_is_named(folder, monkeypatch):
    said = []

    def say(text, file, **_):
        said.append((threading.get_ident(), text, file))

    monkeypatch.setattr(files, "print", say, raising=False)
    monkeypatch.setattr(files, "_SECONDS_TO_BE_SLOW", 0.3)
    files._watch.cache_clear()  # the thread of another test sleeps for longer
    # A pipe that takes the place of a file once that is checked: reading it waits, as for a
    # network that does not answer.
    monkeypatch.setattr(files, "check_regular", lambda path: None)
    pipe, read = folder / "pi\npe.png", []
    os.mkfifo(pipe)
    (folder / "fast.png").write_bytes(b"fast")
    reader = threading.Thread(target=lambda: read.append(read_regular(pipe)))
    reader.start()
    assert read_regular(folder / "fast.png") == b"fast"
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    pipe.write_bytes(b"slow")
    reader.join()
    assert read == [b"slow"] and not files._being_read
    threads, lines, places = zip(*said, strict=True)
    assert all(line.startswith(f"{str(pipe)!a} is still being read after ") for line in lines)
    assert not any("\n" in line for line in lines) and set(places) == {sys.stderr}
    # Once, but that the thread of another test may wake up in time.
    assert len(set(threads)) == len(threads)


def test_files_of_a_user_whom_nobody_knows(folder):
    # As in a container that runs under a number of its own.
    path = folder / "file"
    path.write_bytes(b"12345")
    try:
        os.chown(path, 54321, 54321)
    except OSError as error:
        pytest.skip(f"this user cannot give files away: {error}")
    os.utime(path, (9, 9))
    assert size(path) == 5 and modified(path) == 9


def test_matching_names_alone(folder):
    below = folder / "runs[1]"
    below.mkdir()
    for name in ("b.json", "a.json", ".c.json", "d.JSON", "e.txt"):
        (below / name).write_text("")
    assert [path.name for path in matching(below, "*.json")] == [".c.json", "a.json", "b.json"]
    assert [path.name for path in matching(below, ".*")] == [".c.json"]
    assert matching(folder / "nowhere", "*") == []
