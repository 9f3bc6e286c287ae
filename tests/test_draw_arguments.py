import dataclasses

import pytest

import configs
from pipelines.arguments import parse


def test_sample_unset_is_none():
    assert parse(["sample", "runs/x"]).arguments == {
        "run_dir": "runs/x",
        "num": None,
        "labels": None,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "guidance": None,
        "seed": None,
        "batch_size": None,
        "output": None,
    }


def test_sample_in_full():
    words = "sample d --num 4 --label A 3 --label=B --temperature 0.5 --top-k 9 --top_p 0.9"
    words += " --guidance 2 --seed -1 --batch-size 2 --output x.png"
    assert parse(words.split()).arguments == {
        "run_dir": "d",
        "num": 4,
        "labels": ["A", "3", "B"],
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.9,
        "guidance": 2.0,
        "seed": -1,
        "batch_size": 2,
        "output": "x.png",
    }


def test_sample_has_a_flag_for_every_setting():
    given = parse(["sample", "d"]).arguments
    assert {field.name for field in dataclasses.fields(configs.SampleConfig)} < set(given)


def test_sample_out_of_range_names_the_flag():
    with pytest.raises(configs.VqbeamError, match=r"^--top-p is 1.5; it must be at most 1$"):
        parse(["sample", "d", "--top-p", "1.5"])
