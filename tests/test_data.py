import itertools

import numpy as np
import pytest
import tensorflow as tf

from vqbeam.vqvae.fitting import data as module
from vqbeam.vqvae.fitting.data import training_data
from vqbeam.vqvae.fitting.fit import set_seed

SIZE, BATCH = 10, 4
ROWS = np.arange(SIZE * 3, dtype="uint8").reshape(SIZE, 3)


@pytest.fixture(autouse=True)
def seeded():
    """Dataset.shuffle refuses the seeds of later passes if the global seed is zero."""
    set_seed(0)


def make(seed=0, batch_size=BATCH):
    return training_data(
        tf.data.Dataset.from_tensor_slices({"row": ROWS}),
        size=SIZE,
        batch_size=batch_size,
        seed=seed,
        numbers=lambda seed, count: {"noise": tf.random.stateless_uniform([count], seed)},
        prepare=lambda batch: {"first": batch["row"][:, 0], "noise": batch["noise"]},
    )


def first_inputs(data, count, first_step=0):
    taken = itertools.islice(data.inputs(first_step), count)
    return [{name: np.asarray(values) for name, values in batch.items()} for batch in taken]


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


@pytest.fixture(params=["held", "streamed"])
def data(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(module, "_fits_in_memory", lambda size: False)
    made = make()
    assert bool(made.held) == (request.param == "held")
    return made


def test_each_pass_has_every_example_once_in_an_order_of_its_own(data):
    found = joined(first_inputs(data, 5), "first") // 3  # 20 examples, two passes
    passes = found.reshape(2, SIZE).tolist()
    assert all(sorted(one) == list(range(SIZE)) for one in passes)
    assert passes[0] != passes[1] and passes[0] != list(range(SIZE))


def test_streamed_without_random_numbers(monkeypatch):
    monkeypatch.setattr(module, "_fits_in_memory", lambda size: False)
    data = training_data(
        tf.data.Dataset.from_tensor_slices({"row": ROWS}),
        size=SIZE,
        batch_size=BATCH,
        seed=0,
        numbers=lambda seed, count: {},
        prepare=lambda batch: {"first": batch["row"][:, 0]},
    )
    with_numbers = joined(first_inputs(make(), 5), "first")
    np.testing.assert_array_equal(joined(first_inputs(data, 5), "first"), with_numbers)
    np.testing.assert_array_equal(joined(first_inputs(data, 2, 3), "first"), with_numbers[12:])


def test_no_training_waits_for_tuning_when_it_ends(data):
    assert data.batches(0, 1).options().autotune.enabled is False


@pytest.mark.slow
def test_begins_at_any_step(data):
    whole = first_inputs(data, 9)
    for step in (1, 3, 6):
        for one, other in zip(whole[step:], first_inputs(data, 9 - step, step), strict=True):
            np.testing.assert_array_equal(one["first"], other["first"])
            np.testing.assert_array_equal(one["noise"], other["noise"])


def test_steps_that_go_together_are_the_same(data):
    single = list(data.batches(2, 1).take(6).as_numpy_iterator())
    groups = list(data.batches(2, 3).take(2).as_numpy_iterator())
    for name in single[0]:
        expected = np.concatenate([batch[name] for batch in single])
        np.testing.assert_array_equal(joined(groups, name), expected)


@pytest.mark.slow
def test_each_step_has_random_numbers_of_its_own(data):
    noise = joined(first_inputs(data, 150), "noise")  # more steps than are drawn at once
    # float32 has 2^23 numbers here, of which a few may come twice.
    assert len(set(noise.tolist())) > 595
    assert np.abs(noise - joined(first_inputs(make(seed=1), 150), "noise")).mean() > 0.25


@pytest.mark.slow
def test_the_seed_gives_the_order():
    orders = [joined(first_inputs(make(seed), 3), "first").tolist() for seed in (0, 0, 1, 2**31)]
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) == 3


@pytest.mark.slow
@pytest.mark.backend
def test_a_batch_larger_than_the_data():
    found = first_inputs(make(batch_size=25), 2)
    assert np.bincount(joined(found, "first") // 3).tolist() == [5] * SIZE


def test_data_are_held_if_host_and_device_have_the_memory(monkeypatch):
    monkeypatch.setattr(module.os, "sysconf", {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 30}.get)
    assert module._fits_in_memory(30) and not module._fits_in_memory(31)
    monkeypatch.setattr(module, "device_memory", lambda: 100)
    assert module._fits_in_memory(25) and not module._fits_in_memory(26)


@pytest.mark.parametrize(("limit", "fits"), [("160", 20), ("1000", 30), ("max", 30), (None, 30)])
def test_a_container_has_less_memory_than_its_host(monkeypatch, tmp_path, limit, fits):
    monkeypatch.setattr(module.os, "sysconf", {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 30}.get)
    monkeypatch.setattr(module, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert module._fits_in_memory(fits) and not module._fits_in_memory(fits + 1)
