import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from measured_run import add_models
from PIL import Image

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.lock import LOCK_FILE, locked
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.sample import sample
from vqbeam.pipelines.stages import generate as generate_module
from vqbeam.pipelines.stages.generate import generate

pytestmark = pytest.mark.slow

LABELS = ["cherry", "apple"]
# Eight images in shards of three, the run's batch.
ORDER = {
    "num": 8,
    "labels": LABELS,
    "seed": 3,
    "shard_images": 2,
    "beam_args": ["--runner=FnApiRunner"],
}
SHARDS = ["00000-of-00003", "00001-of-00003", "00002-of-00003"]


@pytest.fixture(scope="module")
def expected(finished_run, tmp_path_factory):
    """What `sample` draws of the same seed."""
    path = tmp_path_factory.mktemp("expected") / "samples.npz"
    sample(str(finished_run.root), output=str(path), num=8, labels=LABELS, seed=3)
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def generated(finished_run, tmp_path_factory):
    """Returns the folder of a whole order of a format, which is not to be changed."""
    made = {}

    def folder_of(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp("generated") / "new" / form
            order = ORDER | {"form": form, "output": str(made[form])}
            generate(str(finished_run.root), **order)
        return made[form]

    return folder_of


@pytest.fixture
def pngs(generated):
    return generated("png")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_pngs_are_those_of_sample(pngs, expected):
    assert sorted(path.name for path in pngs.iterdir()) == [*SHARDS, "generate.json"]
    index = 0
    for shard in SHARDS:
        for line in (pngs / shard / "samples.jsonl").read_text().splitlines():
            facts = json.loads(line)
            assert (facts["index"], facts["file"]) == (index, f"{index:05d}.png")
            assert facts["name"] == LABELS[index % 2] and facts["seed"] == 3
            with Image.open(pngs / shard / facts["file"]) as image:
                np.testing.assert_array_equal(np.asarray(image), expected["images"][index])
            index += 1
    assert index == 8


def test_a_dataset(finished_run, expected, tmp_path, capsys):
    folder = tmp_path / "of any.name"
    words = "--num 8 --label cherry apple --seed 3 --shard-images 3 --format tfrecord".split()
    command = ["generate", str(finished_run.root), *words, "--output", str(folder)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"8 images, a TFDS dataset: {folder}\n"
    builder = tfds.builder_from_directory(str(folder))
    assert builder.info.splits["train"].shard_lengths == [3, 3, 2]
    assert '"seed": 3' in builder.info.description
    dataset = builder.as_dataset(split="train")
    for index, example in enumerate(dataset.as_numpy_iterator()):
        np.testing.assert_array_equal(example["image"], expected["images"][index])
        assert example["label"] == expected["labels"][index]
        assert example["key"].decode() == f"{index:05d}"
    assert index == 7
    assert [path.name.split("-")[0] for path in folder.glob(".*")] == [".reports"]


def test_an_archive(finished_run, expected, tmp_path, capsys):
    folder = tmp_path / "new"
    words = "--num 8 --label cherry apple --seed 3 --shard-images 3 --format npz".split()
    command = ["generate", str(finished_run.root), *words, "--output", str(folder)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"8 images, samples.npz: {folder}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["generate.json", "samples.npz"]
    with np.load(folder / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], expected["images"])
        np.testing.assert_array_equal(arrays["arr_1"], expected["labels"])
    assert main(command) == 0
    assert "done already" in capsys.readouterr().out


def test_the_workers_do_not_matter(finished_run, pngs, tmp_path):
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    order = ORDER | {"beam_args": [*ORDER["beam_args"], *workers]}
    generate(str(finished_run.root), output=str(tmp_path / "two"), **order)
    assert contents(tmp_path / "two") == contents(pngs)


@pytest.mark.parametrize("form", ["png", "npz", "tfrecord"])
def test_goes_on_with_the_shards_that_are_missing(
    finished_run, generated, tmp_path, monkeypatch, form
):
    order = ORDER | {"form": form, "output": str(tmp_path / "new")}
    whole, drawn, fails = generated(form), [], True
    sample_rows = Run.sample_rows

    def failing(run, labels, seed, settings, first, on_batch):
        if fails and first == 3:
            raise OSError(28, "No space left on device")
        drawn.append(first)
        return sample_rows(run, labels, seed, settings, first, on_batch)

    monkeypatch.setattr(Run, "sample_rows", failing)
    with pytest.raises(Exception, match="No space left"):
        generate(str(finished_run.root), **order)
    token = "0123456789abcdef" * 2
    half = tmp_path / "new" / f".samples-train.tfrecord-00001-of-00003.{token}"
    half.write_text("half a shard")
    if form == "png":  # or half a picture, of the shard that a worker was killed in
        (tmp_path / "new" / SHARDS[1]).mkdir(exist_ok=True)
        (tmp_path / "new" / SHARDS[1] / f".00004.png.{token}").write_text("half a picture")
    before, fails = list(drawn), False
    generate(str(finished_run.root), **order)
    # The runner may give up before or after the third shard; what it had drawn is not done again.
    assert sorted(drawn) == [0, 3, 6] and len(before) < 3
    assert contents(tmp_path / "new") == contents(whole)


def test_what_is_done_is_not_done_again(finished_run, pngs, monkeypatch):
    monkeypatch.setattr(generate_module, "run_pipeline", None)
    said = generate(str(finished_run.root), output=str(pngs), **ORDER)
    assert said == f"8 images (done already), PNGs by shard: {pngs}"


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


# The form, what becomes of its files, and the first images of the shards that are sampled again.
DAMAGE = [
    ("png", lambda folder: (folder / SHARDS[1] / "00004.png").unlink(), [3]),
    ("png", lambda folder: cut(folder / SHARDS[1] / "00004.png"), [3]),
    ("png", lambda folder: (folder / SHARDS[2] / "samples.jsonl").write_text("{"), [6]),
    ("png", lambda folder: shutil.rmtree(folder / SHARDS[0]), [0]),
    ("tfrecord", lambda folder: cut(folder / "samples-train.tfrecord-00001-of-00003"), [3]),
    ("tfrecord", lambda folder: (folder / "dataset_info.json").unlink(), []),
    ("npz", lambda folder: cut(folder / "samples.npz"), [0, 3, 6]),
]


@pytest.mark.parametrize(("form", "damage", "again"), DAMAGE)
def test_a_lost_shard_is_sampled_again_and_no_other(
    finished_run, generated, tmp_path, monkeypatch, form, damage, again
):
    order = ORDER | {"form": form, "output": str(tmp_path / "new")}
    shutil.copytree(generated(form), tmp_path / "new")
    before = contents(tmp_path / "new")
    damage(tmp_path / "new")
    sample_rows, sampled = Run.sample_rows, []

    def watched(run, labels, seed, settings, first, on_batch):
        sampled.append(first)
        return sample_rows(run, labels, seed, settings, first, on_batch)

    monkeypatch.setattr(Run, "sample_rows", watched)
    assert "done already" not in generate(str(finished_run.root), **order)
    assert sorted(sampled) == again
    assert contents(tmp_path / "new") == before
    assert "done already" in generate(str(finished_run.root), **order)


def test_another_order_in_the_same_folder(finished_run, pngs):
    for change, told in [
        ({"seed": 4}, "images of seed 3; ask for the same"),
        ({"num": 9, "top_k": 2}, "images of top_k 0, num 8; ask for the same"),
        ({"labels": None}, r"images of labels \['cherry', 'apple'\]; ask"),
        ({"form": "tfrecord"}, "images of form png; ask"),
    ]:
        with pytest.raises(VqbeamError, match=told):
            generate(str(finished_run.root), output=str(pngs), **ORDER | change)


def test_two_commands_into_one_folder(finished_run, tmp_path):
    folder = tmp_path / "new"
    with locked(epath.Path(folder), "--output"):
        told = "new is in use by process .*; wait until it ends, or choose another --output"
        with pytest.raises(VqbeamError, match=told):
            generate(str(finished_run.root), output=str(folder), **ORDER)
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_refusals_leave_nothing(finished_run, tmp_path):
    run, folder = str(finished_run.root), tmp_path / "new"
    for change, told in [
        ({"labels": ["plum"]}, "the run has no label 'plum'; it has Banana, apple, cherry"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ]:
        with pytest.raises(VqbeamError, match=told):
            generate(run, output=str(folder), **ORDER | change)
    with pytest.raises(VqbeamError, match="is not a run folder"):
        generate(str(tmp_path / "none"), output=str(folder), **ORDER)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(VqbeamError, match="new is not empty; give another --output"):
        generate(run, output=str(folder), **ORDER)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_run_that_was_trained_anew_meanwhile(finished_run, tmp_path, monkeypatch):
    checkpoints = ["of before"]  # and then another one
    found = property(lambda run: checkpoints.pop() if checkpoints else "of now")
    monkeypatch.setattr(Run, "checkpoint", found)
    with pytest.raises(
        Exception, match="was trained again while images were sampled from it; delete"
    ):
        generate(str(finished_run.root), output=str(tmp_path / "new"), **ORDER)


def test_a_run_without_classes(prepared_run, tiny_config, tmp_path):
    run, pixels = prepared_run(tiny_config(sample__batch_size=3), labels=())
    add_models(run, pixels, labels=())
    order = ORDER | {"labels": None, "form": "tfrecord", "output": str(tmp_path / "new")}
    generate(str(run.root), **order)
    builder = tfds.builder_from_directory(str(tmp_path / "new"))
    assert set(builder.info.features) == {"image", "key"}
    assert builder.info.splits["train"].num_examples == 8
