import warnings

import fuzz
import pytest


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_what_others_give(target):
    for seed in range(200 if target == "images" else 20):
        fuzz.run_case(target, seed)


@pytest.mark.parametrize("case", fuzz.FOUND)
def test_what_was_found_once(case):
    fuzz.run_case(*case)


@pytest.mark.parametrize("format", fuzz.FORMATS)
def test_unchanged_files_are_read(format):
    for number in range(0, fuzz.BASES, 10):
        data = fuzz.base_image(format, number)
        found = fuzz.decode_image(data, height=8, width=8, channels=3, fit="crop")
        assert found.shape == (8, 8, 3)
