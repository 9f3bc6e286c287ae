import dataclasses

import pytest
from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.stages.generate import GenerateJob


@pytest.fixture
def job(tmp_path):
    settings = SampleConfig(num=8, top_k=2)
    return GenerateJob("run", str(tmp_path / "new"), "png", ("a",), 3, 4, settings, "small", "0123")


def changed(job, **changes):
    return dataclasses.replace(job, **changes)


@pytest.mark.parametrize(("num", "shards"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_shards(job, num, shards):
    assert changed(job, settings=SampleConfig(num=num)).shards == shards


def test_facts_are_what_is_drawn_and_not_where(job):
    facts = job.facts
    assert facts["num"] == 8 and facts["top_k"] == 2 and facts["labels"] == ["a"]
    assert facts["seed"] == 3 and facts["checkpoint"] == "0123" and facts["form"] == "png"
    elsewhere = changed(job, run="moved", output="other")
    assert elsewhere.facts == facts and elsewhere.fingerprint == job.fingerprint
    assert changed(job, seed=4).fingerprint != job.fingerprint
    fast = changed(job, settings=dataclasses.replace(job.settings, precision="fast"))
    assert facts["precision"] == "exact" and fast.facts == facts | {"precision": "fast"}


def test_a_folder_has_one_order(job):
    job.bind_folder()
    assert not job.is_done()
    job.bind_folder()
    with pytest.raises(VqbeamError, match="holds images of seed 3; ask for the same, or give"):
        changed(job, seed=4).bind_folder()
    job.finish()
    job.bind_folder()
    assert job.is_done()


def test_a_folder_of_something_else_is_left_alone(job):
    folder = epath.Path(job.output)
    folder.mkdir()
    job.bind_folder()
    (folder / "generate.json").unlink()
    (folder / "mine").mkdir()
    with pytest.raises(VqbeamError, match="is not empty"):
        job.bind_folder()
    assert [path.name for path in folder.iterdir()] == ["mine"]
