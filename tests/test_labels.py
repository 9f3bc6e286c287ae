import unicodedata

import numpy as np
import pytest

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.labels import Labels, label_name, label_number, labels_for, parse_label

NAMES = ("Banana", "apple", "cherry")


def test_names_numbers_and_case_in_turn():
    assert labels_for(["cherry", "0", "APPLE", "banana"], Labels(NAMES), 6).tolist() == [
        2,
        0,
        1,
        0,
        2,
        0,
    ]


def test_a_name_goes_before_its_like_in_another_case():
    numbers = labels_for(["a", "A", "0", "1", "3"], Labels(("A", "a", "1", "0")), 5)
    assert numbers.tolist() == [1, 0, 3, 2, 3]


def test_the_unicode_form_of_a_name_does_not_matter():
    decomposed = unicodedata.normalize("NFD", "Café")
    assert label_number("café", ["tea", decomposed]) == 1
    assert label_number(decomposed, ["tea", "café"]) == 1


def test_all_classes_or_none():
    assert labels_for(None, Labels(NAMES), 4).tolist() == [0, 1, 2, 0]
    assert labels_for(None, Labels(), 2).tolist() == [-1, -1]


def test_images_from_the_middle_have_the_labels_that_they_have_among_all():
    whole = labels_for(["cherry", "apple", "1"], Labels(NAMES), 9).tolist()
    assert labels_for(["cherry", "apple", "1"], Labels(NAMES), 4, first=5).tolist() == whole[5:]


@pytest.mark.parametrize("label", ["melon", "3", "-1", "²", "1.0"])
def test_unknown_label(label):
    with pytest.raises(VqbeamError) as caught:
        label_number(label, NAMES)
    wanted = "Banana, apple, cherry, or by number 0 to 2"
    assert str(caught.value) == f"the run has no label {label!r}; it has {wanted}"


def test_many_classes_are_not_all_listed():
    with pytest.raises(VqbeamError, match="it has 0, 1, .*, 29, …, or by number 0 to 30$"):
        label_number("x", [str(number) for number in range(31)])


def test_no_classes():
    with pytest.raises(
        VqbeamError, match="label 'apple' was asked for, but the run has no classes"
    ):
        labels_for(["apple"], Labels(), 2)


FACES = Labels(("Young", "Smiling", "Hat, red"), "attributes")


def test_attributes_of_an_image_are_joined_by_commas():
    rows = labels_for(["young,Smiling", "1", "Hat, red", "smiling, young"], FACES, 5)
    assert rows.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 0]]
    assert label_name(rows[0], FACES) == "Young,Smiling"
    # Each alone, in turn.
    assert labels_for(None, FACES, 4).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert parse_label(None, FACES) == (-1, -1, -1)
    with pytest.raises(VqbeamError, match="has no label 'old'; it has Young, Smiling, Hat, red"):
        parse_label("young,old", FACES)


def test_labels_as_records_have_them():
    assert labels_for(np.array([2, -1]), Labels(NAMES), 3).tolist() == [2, -1, 2]
    assert labels_for([[1, 0, 1], "young"], FACES, 2).tolist() == [[1, 0, 1], [1, 0, 0]]
    assert label_name(-1, Labels(NAMES)) == label_name((-1, -1, -1), FACES) == ""
    for label, labels, message in [
        (len(NAMES), Labels(NAMES), f"; give a name or a number from 0 to {len(NAMES) - 1}"),
        (1.0, Labels(NAMES), "has no label 1.0"),
        ([1, 2, 0], FACES, "; give a name or 3 numbers, 0 or 1"),
        ([1, 0], FACES, "has no label"),
        (0, Labels(), "the run has no label 0; it has no classes"),
    ]:
        with pytest.raises(VqbeamError, match=message):
            parse_label(label, labels)
