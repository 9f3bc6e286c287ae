import dataclasses

import pytest
from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.stages.generate import Order


@pytest.fixture
def order(tmp_path):
    settings = SampleConfig(num=8, top_k=2)
    return Order("run", str(tmp_path / "new"), "png", ("a",), 3, 4, settings, "small", "0123")


def changed(order, **changes):
    return dataclasses.replace(order, **changes)


@pytest.mark.parametrize(("num", "shards"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_shards(order, num, shards):
    assert changed(order, settings=SampleConfig(num=num)).shards == shards


def test_facts_are_what_is_drawn_and_not_where(order):
    facts = order.facts
    assert facts["num"] == 8 and facts["top_k"] == 2 and facts["labels"] == ["a"]
    assert facts["seed"] == 3 and facts["checkpoint"] == "0123" and facts["form"] == "png"
    elsewhere = changed(order, run="moved", output="other")
    assert elsewhere.facts == facts and elsewhere.fingerprint == order.fingerprint
    assert changed(order, seed=4).fingerprint != order.fingerprint


def test_a_folder_has_one_order(order):
    order.claim_folder()
    assert not order.is_done()
    order.claim_folder()
    with pytest.raises(VqbeamError, match="holds images of seed 3; ask for the same, or give"):
        changed(order, seed=4).claim_folder()
    order.finish()
    order.claim_folder()
    assert order.is_done()


def test_a_folder_of_something_else_is_left_alone(order):
    folder = epath.Path(order.output)
    folder.mkdir()
    order.claim_folder()
    (folder / "generate.json").unlink()
    (folder / "mine").mkdir()
    with pytest.raises(VqbeamError, match="is not empty"):
        order.claim_folder()
    assert [path.name for path in folder.iterdir()] == ["mine"]
