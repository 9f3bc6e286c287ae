import pytest

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.parser import UsageError


def test_evaluate():
    expected = {
        "run_dir": "d",
        "features": "classifier",
        "stage": "all",
        "num": None,
        "seed": None,
        "sweep": None,
        "store": False,
    }
    assert parse(["evaluate", "d"])[1] == expected
    words = ["evaluate", "d", "--features=inception", "--stage=prior", "--num=50", "--seed=3"]
    changed = {"features": "inception", "stage": "prior", "num": 50, "seed": 3}
    assert parse(words)[1] == expected | changed


def test_a_sweep():
    words = ["temperature=0.8,0.9,0.80", "top-k=5", "guidance_schedule=linear,constant"]
    arguments = parse(["evaluate", "d", "--sweep", *words, "--store"])[1]
    assert arguments["store"] is True
    assert arguments["sweep"] == {
        "temperature": [0.8, 0.9],
        "top_k": [5],
        "guidance_schedule": ["linear", "constant"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "d", "--store"], "--store stores the best settings of a sweep; add --sweep"),
        (["evaluate", "d", "--stage=x"], "--stage: invalid choice: 'x'"),
        (["evaluate", "d", "--num=0"], "--num: 0 is not at least 1"),
        (["evaluate", "d", "--seed=-1"], "--seed: -1 is not at least 0"),
        (
            ["evaluate", "d", "--stage=vqvae", "--seed=3"],
            "--seed is for samples of the prior, and --stage vqvae takes none",
        ),
        (["evaluate", "d", "--stage=vqvae", "--num=3"], "--num is for samples of the prior, and"),
        (["evaluate", "d", "--sweep"], "--sweep needs a value"),
        (["evaluate", "d", "--sweep", "top_k"], "--sweep: 'top_k' is not SETTING=VALUE,...; the"),
        (["evaluate", "d", "--sweep", "num=3"], "--sweep: 'num=3' is not SETTING=VALUE"),
        (["evaluate", "d", "--sweep", "top_k=1.5"], "--sweep: top_k=1.5: '1.5' is not an integer"),
        (["evaluate", "d", "--sweep", "top_k="], "--sweep: top_k=: '' is not an integer"),
        (
            ["evaluate", "d", "--stage=prior", "--sweep", "top_k=1"],
            "--stage and --sweep exclude each other",
        ),
        (["score", "d"], "vqbeam score: missing --input"),
        (["export", "d"], "vqbeam export: missing --output"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert message in str(caught.value).replace(": needs", " needs")


def test_each_value_of_a_sweep_is_checked():
    with pytest.raises(VqbeamError, match="top_p is 2.0; it must be at most 1"):
        parse(["evaluate", "d", "--sweep", "top_p=0.5,2"])


def test_score():
    expected = {"run_dir": "d", "input": "i", "label": None, "output": None, "precision": None}
    expected |= {"sort": False}
    assert parse(["score", "d", "--input=i"])[1] == expected
    words = ["score", "d", "--input=i", "--label=3", "--output=o", "--sort"]
    changed = {"label": "3", "output": "o", "precision": "fast", "sort": True}
    assert parse([*words, "--precision=fast"])[1] == expected | changed
    with pytest.raises(VqbeamError, match="^--precision is 'half'; choose one of exact, fast$"):
        parse([*words, "--precision=half"])


def test_export():
    wanted = {"run_dir": "d", "output": "o", "form": "savedmodel"}
    assert parse(["export", "d", "--output=o"])[1] == wanted
    words = ["export", "d", "--output=o", "--format", "safetensors"]
    assert parse(words)[1] == wanted | {"form": "safetensors"}
