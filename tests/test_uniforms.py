import numpy as np

from vqbeam.prior.filters import uniforms


def test_an_image_has_its_own_numbers():
    together = uniforms(7, np.arange(100), 16)
    assert together.shape == (100, 16) and together.dtype == np.float32
    np.testing.assert_array_equal(uniforms(7, np.array([42]), 16)[0], together[42])
    np.testing.assert_array_equal(uniforms(7, np.arange(100), 5), together[:, :5])
    assert len(np.unique(together)) > 1590


def test_seeds_differ_and_may_be_any_integer():
    rows = [uniforms(seed, np.array([0]), 8)[0] for seed in (0, 1, -1, 2**64, 2**127)]
    assert len({row.tobytes() for row in rows}) == 5


def philox(counter, key):
    """One block of Philox4x64-10, after Salmon et al."""
    a, b, c, d = counter
    for _ in range(10):
        high, low = divmod(a * 0xD2E7470EE14C6C93, 2**64)
        other_high, other_low = divmod(c * 0xCA5A826395121157, 2**64)
        a, b, c, d = other_high ^ b ^ key[0], other_low, high ^ d ^ key[1], low
        key = (key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64
    return a, b, c, d


def test_values_are_those_of_philox():
    # NumPy counts up before each block.
    raw = [*philox((1, 0, 0, 5), (3, 0)), *philox((2, 0, 0, 5), (3, 0))]
    expected = np.array([bits >> 40 for bits in raw]) / 2**24
    np.testing.assert_array_equal(uniforms(3, np.array([5]), 8)[0], expected)


def test_values_are_uniform_and_below_one():
    numbers = uniforms(0, np.arange(1000), 256)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert np.sum((counts - 4000) ** 2 / 4000) < 120  # chi-square, 63 degrees of freedom


def test_the_largest_raw_number_stays_below_one(monkeypatch):
    monkeypatch.setattr("vqbeam.prior.filters._raw", lambda *_: np.full(2, 2**64 - 1, "uint64"))
    np.testing.assert_array_equal(uniforms(0, np.array([0]), 2), np.float32(1 - 2**-24))


def test_no_images():
    assert uniforms(0, np.arange(0), 4).shape == (0, 4)
