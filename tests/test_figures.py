import numpy as np
import pytest
from etils import epath
from PIL import Image

from vqbeam.vqvae import figures
from vqbeam.vqvae.figures import label_figure, reconstruction_figure, save_png

# What a person counts in the picture: tiles of 64 pixels with 4 of white between them, and 16 more
# above for a heading.
TILE, GAP, HEADING = 64, 4, 16


def tiles(count, channels=3, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), np.uint8)


def test_an_image_with_its_codes():
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 1), np.uint8)
    shown = np.asarray(figures.code_figure(image, np.arange(8).reshape(2, 4), (1, 2)))
    assert shown.shape == (256, 512, 3)
    pixels = np.kron(image[..., 0], np.ones((32, 32), np.uint8))
    changed = (shown != pixels[..., None]).any(axis=-1)
    # A cell is 128 pixels large: lines at its edges, a number in its middle, nothing between.
    for row, column in np.ndindex(2, 4):
        cell = changed[128 * row :, 128 * column :][:128, :128]
        assert cell[0].all() and cell[:, 0].all() and cell[48:80, 48:80].any()
        assert not cell[8:40, 8:120].any() and not cell[88:120, 8:120].any()
    assert shown[130, 2 * 128 + 60].tolist() == [255, 90, 0]
    assert shown[130, 128 + 60].tolist() != [255, 90, 0]
    # Where there is no room for numbers, there are none.
    tight = np.asarray(figures.code_figure(image, np.arange(32 * 64).reshape(32, 64)))
    assert tight.shape == (256, 512, 3) and (tight[4::8, 4::8] == pixels[4::8, 4::8, None]).all()


def tile_at(figure, column, row, top=GAP, tile=TILE):
    left, upper = GAP + column * (tile + GAP), top + row * (tile + GAP)
    return np.asarray(figure)[upper : upper + tile, left : left + tile]


def enlarged(image, tile=TILE):
    scale = tile // image.shape[1]
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    return rgb.repeat(scale, axis=0).repeat(scale, axis=1)


def assert_blank(pixels):
    np.testing.assert_array_equal(pixels, 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_original_is_above_its_reconstruction(channels):
    originals, copies = tiles(20, channels), tiles(20, channels, seed=1)
    figure = reconstruction_figure(originals, copies)
    assert figure.mode == "RGB"
    assert figure.size == (16 * (TILE + GAP) + GAP, 4 * (TILE + GAP) + GAP)
    for i in range(20):
        band, column = divmod(i, 16)
        np.testing.assert_array_equal(tile_at(figure, column, 2 * band), enlarged(originals[i]))
        np.testing.assert_array_equal(tile_at(figure, column, 2 * band + 1), enlarged(copies[i]))
    assert_blank(tile_at(figure, 4, 2))
    # White between the tiles and around them.
    assert_blank(np.asarray(figure)[:GAP])
    assert_blank(np.asarray(figure)[:, TILE + GAP : TILE + 2 * GAP])


def test_plain_grid_in_reading_order():
    images = tiles(7)
    figure = label_figure(images, None)
    assert figure.size == (3 * (TILE + GAP) + GAP, 3 * (TILE + GAP) + GAP)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(tile_at(figure, i % 3, i // 3), enlarged(image))
    assert_blank(tile_at(figure, 1, 2))


def test_each_image_is_under_its_heading(monkeypatch):
    written = []
    draw = figures._write_headings
    monkeypatch.setattr(
        figures, "_write_headings", lambda f, names, s: (written.append(names), draw(f, names, s))
    )
    images = tiles(7)
    headings = ["cat", "dog", "cat", "bird", "dog", "cat", "cat"]
    figure = label_figure(images, headings)
    assert written == [["cat", "dog", "bird"]]
    top = GAP + HEADING
    # One band ends with the white of a stack.
    assert figure.size == (3 * (TILE + GAP) + GAP, top + 4 * (TILE + GAP) + GAP)
    columns = {"cat": [0, 2, 5, 6], "dog": [1, 4], "bird": [3]}
    for column, indices in enumerate(columns.values()):
        for row in range(4):
            found = tile_at(figure, column, row, top)
            if row < len(indices):
                np.testing.assert_array_equal(found, enlarged(images[indices[row]]))
            else:
                assert_blank(found)
    # Ink above each column, within its width.
    above = np.asarray(figure)[:top]
    for column in range(3):
        left = GAP + column * (TILE + GAP)
        assert (above[:, left : left + TILE] < 128).any()
        assert_blank(above[:, left + TILE : left + TILE + GAP])


@pytest.mark.parametrize(
    ("labels", "images", "columns", "rows"),
    [(3, 81, 9, 9), (3, 27, 6, 5), (1, 64, 8, 8), (2, 3, 2, 2), (10, 80, 10, 8), (26, 52, 13, 4)],
)
def test_few_labels_fill_the_width(labels, images, columns, rows):
    names = [f"l{index % labels}" for index in range(images)]
    figure = label_figure(tiles(images), names, fill=True)
    assert figure.size[0] == columns * (TILE + GAP) + GAP
    bands = -(-labels // 13)
    assert figure.size[1] == rows * (TILE + GAP) + bands * (GAP + HEADING) + GAP
    # Of one label they are read from left to right, and then down.
    each = columns * bands // labels
    for index in range(0, images, labels):
        turn = index // labels
        if bands == 1:
            found = tile_at(figure, turn % each, turn // each, GAP + HEADING)
            np.testing.assert_array_equal(found, enlarged(tiles(images)[index]))


def ink_above(figure, column, upper=0):
    left = GAP + column * (TILE + GAP)
    return np.asarray(figure)[upper : upper + GAP + HEADING, left : left + TILE]


def test_a_heading_is_drawn_over_the_column_of_its_own_label():
    images = tiles(2)
    one, other = (label_figure(images, names) for names in (["cat", "dog"], ["dog", "cat"]))
    np.testing.assert_array_equal(ink_above(one, 0), ink_above(other, 1))
    np.testing.assert_array_equal(ink_above(one, 1), ink_above(other, 0))
    assert (ink_above(one, 0) != ink_above(one, 1)).any()


def test_long_headings_shrink_into_their_column():
    plain = label_figure(tiles(2), ["a", "wide label here"])
    assert (ink_above(plain, 1) < 200).any()
    # Nothing spills into the column beside it.
    np.testing.assert_array_equal(ink_above(plain, 0), ink_above(label_figure(tiles(1), ["a"]), 0))


def test_many_labels_break_into_bands_of_equal_width():
    names = [f"{chr(65 + i)}" for i in range(26)]
    images = tiles(52)
    figure = label_figure(images, names * 2)
    band = GAP + HEADING + 2 * (TILE + GAP)
    assert figure.size == (13 * (TILE + GAP) + GAP, 2 * band + GAP)
    for i in range(26):
        top = (i // 13) * band + GAP + HEADING
        for row in range(2):
            found = tile_at(figure, i % 13, row, top)
            np.testing.assert_array_equal(found, enlarged(images[i + 26 * row]))
        assert (ink_above(figure, i % 13, (i // 13) * band) < 128).any()


@pytest.mark.parametrize(("side", "tile"), [(28, 84), (64, 64), (100, 100)])
def test_tiles_are_whole_multiples_of_at_least_64_pixels(side, tile):
    images = tiles(1, side=side)
    figure = label_figure(images, None)
    np.testing.assert_array_equal(tile_at(figure, 0, 0, tile=tile), enlarged(images[0], tile))


def test_png_holds_its_text(tmp_path):
    path = epath.Path(tmp_path) / "new" / "samples.png"
    figure = label_figure(tiles(1), ["größe"])
    save_png(figure, path, {"vqbeam": '{"label": "größe"}', "seed": "0"})
    with Image.open(path) as read:
        read.load()
        assert read.text == {"vqbeam": '{"label": "größe"}', "seed": "0"}
        np.testing.assert_array_equal(np.asarray(read), np.asarray(figure))


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "samples.png"
    save_png(label_figure(tiles(1), None), path)
    before = path.read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_png(label_figure(tiles(2), None), path)
    assert path.read_bytes() == before
    # Whatever the temporary file is called, nobody takes it for a picture.
    assert [p.name for p in path.parent.glob("*.png")] == ["samples.png"]
