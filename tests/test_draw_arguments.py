import dataclasses

import pytest
from argument_checks import refusal

from vqbeam import configs
from vqbeam.pipelines.cli.main import parse


def test_sample_unset_is_none():
    assert parse(["sample", "runs/x"])[1] == {
        "run_dir": "runs/x",
        "num": None,
        "labels": None,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "guidance": None,
        "guidance_schedule": None,
        "guidance_power": None,
        "guidance_start": None,
        "guidance_end": None,
        "precision": None,
        "seed": None,
        "like": None,
        "batch_size": None,
        "output": "samples.png",
    }


def test_sample_in_full():
    words = "sample d --num 4 --label A 3 --label=B --temperature 0.5 --top-k 9 --top_p 0.9"
    words += " --min-p 0.1 --guidance 2 --guidance-schedule interval --guidance-start 0.2"
    words += " --guidance-power 2 --precision fast"
    words += " --guidance-end 0.8 --seed 5 --batch-size 2 --like a.png --output x.png"
    assert parse(words.split())[1] == {
        "run_dir": "d",
        "num": 4,
        "labels": ["A", "3", "B"],
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.1,
        "guidance": 2.0,
        "guidance_schedule": "interval",
        "guidance_power": 2.0,
        "guidance_start": 0.2,
        "guidance_end": 0.8,
        "precision": "fast",
        "seed": 5,
        "like": "a.png",
        "batch_size": 2,
        "output": "x.png",
    }


COMPLETE = "complete d --input a.jpg --keep top-half --output c.png".split()
INTERPOLATE = "interpolate d --from A --to 3 --output i.png".split()
GENERATE = "generate d --num 9 --output new".split()
DRAWING = pytest.mark.parametrize("words", [["sample", "d"], COMPLETE, INTERPOLATE, GENERATE])


@DRAWING
def test_there_is_a_flag_for_every_setting(words):
    names = [field.name for field in dataclasses.fields(configs.SampleConfig)]
    names.remove("num")
    given = parse(words)[1]
    assert {name: given[name] for name in names} == dict.fromkeys(names)
    given = parse([*words, "--min-p=0.5", "--batch-size=9"])[1]
    assert (given["min_p"], given["batch_size"]) == (0.5, 9)


@DRAWING
def test_out_of_range_names_the_flag(words):
    for flag, value, message in [
        ("--top-p", "1.5", "^--top-p is 1.5; it must be at most 1$"),
        ("--min-p", "1", "^--min-p is 1.0; it must be below 1; --top-k 1 is greedy$"),
        ("--guidance-start", "1", "^--guidance-start is 1.0; it must be below --guidance-end"),
        ("--precision", "half", "^--precision is 'half'; choose one of exact, fast$"),
    ]:
        with pytest.raises(configs.VqbeamError, match=message):
            parse([*words, flag, value])


def test_generate():
    given = parse(GENERATE)[1]
    assert given["run_dir"] == "d" and given["num"] == 9 and given["output"] == "new"
    assert given["form"] == "png" and given["shard_images"] == 1000
    assert given["labels"] is None and given["seed"] is None
    assert given["beam_args"] == ["--runner=FnApiRunner"]
    words = "--format tfrecord --shard-images 64 --label A 3 --seed 5 --top-k 9"
    given = parse([*GENERATE, *words.split(), "--direct_num_workers", "2"])[1]
    assert given["form"] == "tfrecord" and given["shard_images"] == 64
    assert given["labels"] == ["A", "3"] and given["seed"] == 5 and given["top_k"] == 9
    assert given["beam_args"] == ["--runner=FnApiRunner", "--direct_num_workers=2"]


def test_generate_needs_a_number_and_a_folder():
    assert "missing --num, --output" in refusal("generate", "d")
    assert "invalid choice: 'jpeg'" in refusal(*GENERATE, "--format", "jpeg")
    assert "unknown flag --runer" in refusal(*GENERATE, "--runer", "FnApiRunner")
    # A flag of Beam's, and so not unknown.
    assert "did you mean --label?" in refusal(*GENERATE, "--labels", "A")


def test_complete():
    expected = {
        "run_dir": "d",
        "source": "a.jpg",
        "keep": "top-half",
        "num": 4,
        "candidates": 1,
        "label": None,
        "seed": None,
        "output": "c.png",
    }
    assert expected.items() <= parse(COMPLETE)[1].items()
    words = ["--num", "2", "--candidates=9", "--label=B", "--seed=3"]
    changed = expected | {"num": 2, "candidates": 9, "label": "B", "seed": 3}
    assert changed.items() <= parse([*COMPLETE, *words])[1].items()


def test_complete_says_what_has_no_influence(capsys):
    with pytest.raises(SystemExit):
        parse(["complete", "--help"])
    assert "no\ninfluence on codes before it" in capsys.readouterr().out


def test_interpolate():
    expected = {
        "run_dir": "d",
        "start": "A",
        "end": "3",
        "steps": 8,
        "num": 4,
        "seed": None,
        "output": "i.png",
    }
    assert expected.items() <= parse(INTERPOLATE)[1].items()
    more = parse([*INTERPOLATE, "--steps=2", "--num=1", "--seed=3"])[1]
    assert (expected | {"steps": 2, "num": 1, "seed": 3}).items() <= more.items()


@pytest.mark.parametrize(
    "words,message",
    [
        (["complete", "d"], "vqbeam complete: missing --input, --keep, --output"),
        ([*COMPLETE, "--seed", "-1"], "vqbeam complete: --seed: -1 is not at least 0"),
        ([*COMPLETE, "--keep", "s3://b/m.png"], "vqbeam complete: --keep: 's3://b/m.png' can"),
        ([*COMPLETE, "--num", "0"], "vqbeam complete: --num: 0 is not at least 1"),
        (["interpolate", "d"], "vqbeam interpolate: missing --from, --to, --output"),
        ([*INTERPOLATE, "--steps", "1"], "vqbeam interpolate: --steps: 1 is not at least 2"),
    ],
)
def test_wrong_command_lines(words, message):
    assert refusal(*words).startswith(message)
