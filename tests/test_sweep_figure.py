import numpy as np
import pytest

from vqbeam.pipelines.evaluation.sweep import sweep_figure

pytestmark = pytest.mark.slow

VALUES = {"guidance": [1.0, 2.0], "temperature": [0.7, 0.8, 0.9]}
RESULTS = [
    {
        "settings": {"guidance": guidance, "temperature": temperature, "top_k": 0},
        "frechet": guidance + temperature,
        "precision": 1 - temperature / 2,
        "recall": temperature / 2,
    }
    for guidance in VALUES["guidance"]
    for temperature in VALUES["temperature"]
]


def colours(figure):
    return set(map(tuple, np.asarray(figure).reshape(-1, 3).tolist()))


def test_a_line_for_each_combination_of_the_other_settings_and_a_mark_at_the_best():
    figure = sweep_figure(VALUES, RESULTS, best=0)
    assert figure.mode == "RGB" and figure.width == 950
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    # Matplotlib's first colours: one for each guidance, over three temperatures.
    assert {blue, orange} <= colours(figure) and green not in colours(figure)
    other = sweep_figure(VALUES, RESULTS, best=4)
    assert (np.asarray(figure) != np.asarray(other)).any()


@pytest.mark.parametrize("values", [{"top_k": [0]}, {"guidance_schedule": ["linear", "constant"]}])
def test_one_setting_of_any_kind(values):
    ((name, places),) = values.items()
    results = [
        result | {"settings": {name: place}} for result, place in zip(RESULTS, places, strict=False)
    ]
    figure = sweep_figure(values, results, best=0)
    assert (31, 119, 180) in colours(figure) and (255, 127, 14) not in colours(figure)
