import math
import re
import signal
import socket
import time

import keras
import matplotlib
import numpy as np
import pytest
from commands import started
from measured_run import add_models
from PIL import Image
from pipeline_fixtures import SIDE

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.input_images import unpainted_cells
from vqbeam.vqvae.layout import CodeLayout

gradio = pytest.importorskip("gradio", reason="needs pip install -e .[studio]")
httpx = pytest.importorskip("httpx")  # comes with gradio
studio = pytest.importorskip("vqbeam.pipelines.studio")

pytestmark = pytest.mark.slow

GRAY = 128


@pytest.fixture(scope="module")
def run(finished_run):
    return studio.opened(str(finished_run.root))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def log_probabilities(run, codes, label):
    """log p(code | label, previous codes), float64 [T, K]."""
    inputs = {"codes": codes[None], "labels": np.array([label])}
    logits = keras.ops.convert_to_numpy(run.prior(inputs))[0].astype("float64")
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("label", [-1, 2])
def test_the_likelihood_of_an_image(run, image, label):
    found = studio.reading(run, image, label)
    assert (found.codes == run.encode(image[None])[0]).all()
    assert (found.reconstruction == run.reconstruct(image[None])[0]).all()
    expected = -log_probabilities(run, found.codes, label)[range(4), found.codes.ravel()]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-4)
    whole = run.code_log_likelihood(found.codes[None], np.array([label], "int32"), "exact")[0]
    assert found.nats.sum() == pytest.approx(-whole, rel=1e-5)
    bits = expected.sum() / math.log(2) / (SIDE * SIDE * 3)
    assert found.bits_per_dim == pytest.approx(bits, rel=1e-4)


def test_heat_maps():
    colours = matplotlib.colormaps["inferno"]
    nats = np.array([0, 1, 2, 4, 3, 0, 0, 0], "float32")
    (one,) = studio.heat_maps(nats[:4], CodeLayout(9, ((2, 2),)), (4, 6, 3))
    assert one.shape == (4, 6, 3) and one.dtype == np.uint8
    for row, column in np.ndindex(4, 6):
        share = nats[2 * (row // 2) + column // 3] / 4
        assert (one[row, column] == colours(share, bytes=True)[:3]).all()
    # The nats of a cell are added, and each of several grids has its own map and scale.
    (deep,) = studio.heat_maps(nats, CodeLayout(9, ((2, 2),), depth=2), (2, 2, 1))
    sums = np.array([[1, 6], [3, 0]]) / 6
    assert (deep == colours(sums, bytes=True)[..., :3]).all()
    coarse, fine = studio.heat_maps(nats[3:], CodeLayout(9, ((1, 1), (2, 2))), (2, 2, 3))
    assert (coarse == colours(1.0, bytes=True)[:3]).all()
    assert (fine == colours(np.array([[1.0, 0], [0, 0]]), bytes=True)[..., :3]).all()


@pytest.mark.parametrize("cell", [(0, 1), (1, 0)])
def test_what_could_stand_at_a_cell(run, image, cell):
    codes, place = run.encode(image[None])[0], 2 * cell[0] + cell[1]
    found = studio.choice(run, codes, cell, 1)
    assert sorted(found.codes) == list(range(12))
    expected = np.exp(log_probabilities(run, codes, 1)[place])
    np.testing.assert_allclose(found.probabilities, expected[found.codes], rtol=1e-4)
    assert (np.diff(found.probabilities) <= 0).all()
    for code, shown in zip(found.codes, found.images, strict=True):
        changed = codes.copy()
        changed[cell] = code
        # The grid has two rows and columns, so every cell is around every other.
        assert (shown == run.decode(changed[None])[0]).all()


def test_the_neighbourhood_ends_at_the_border():
    assert studio.neighbourhood((0, 3), 4) == (slice(0, 8), slice(8, 20))


def test_a_cell_is_sampled_if_a_tenth_of_it_is_painted():
    painted = np.zeros((20, 30), bool)
    painted[0, :10] = painted[1, :4] = True  # 14 of the 150 pixels of a cell
    painted[10:12, 15:23] = True  # 16 of 150
    expected = [[True, True], [True, False]]
    assert (unpainted_cells(painted, (2, 2)) == expected).all()


def test_completing_what_is_not_painted(run, image):
    painted = np.zeros((64, 64), bool)
    painted[40:60, 4:20] = True
    kept, made = studio.completed(run, image, painted, seed=3, label="apple", temperature=0.5)
    expected = image.copy()
    expected[4:, :4] = GRAY
    assert (kept == expected).all()
    keep = np.ones((SIDE, SIDE), bool)
    keep[4:, :4] = False
    options = dict(seed=3, label="apple", temperature=0.5, batch_size=8)
    assert (made == run.complete(image[None], keep, 8, **options)[0]).all()
    with pytest.raises(VqbeamError, match="nothing is painted over"):
        studio.completed(run, image, np.zeros((64, 64), bool))


def test_the_codes_one_by_one(run, image):
    codes = run.encode(image[None])[0]
    shown = studio.frames(run, codes)
    assert [count for count, _ in shown] == [1, 2, 3, 4]
    for count, frame in shown:
        flat = codes.ravel().copy()
        flat[count:] = flat[count - 1]
        decoded = run.decode(flat.reshape(1, 2, 2))[0]
        for place in range(4):
            rows, columns = (slice(4 * i, 4 * i + 4) for i in divmod(place, 2))
            expected = decoded[rows, columns] if place < count else GRAY
            assert (frame[rows, columns] == expected).all()


@pytest.mark.parametrize(
    "settings,labels,shape",
    [
        ({"quantizer": "residual", "depth": 2}, (), (2, 2, 2)),
        ({"grids": 2}, ("a", "b"), (5,)),
    ],
    ids=["levels without classes", "two grids"],
)
def test_other_layouts(prepared_run, tiny_config, settings, labels, shape):
    config = tiny_config(**{f"vqvae__{name}": value for name, value in settings.items()})
    folder, pixels = prepared_run(config, labels=labels)
    add_models(folder, pixels, labels)
    run = studio.opened(str(folder.root))
    page = studio.build(run)
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]
    assert tabs == ["Sample", "Complete", *["Between two classes"] * bool(labels)] + [
        "Codes",
        "Likelihood",
        "Watch",
    ]
    said = [block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown)]
    sentence = "only a single grid with one code in each cell is shown here."
    assert said.count(f"This run has: {run.prior.layout.describe()}; {sentence}") == 1
    image = pixels["train"][0]
    found = studio.reading(run, image, run.completion_label(None))
    assert found.codes.shape == shape and found.nats.shape == (math.prod(shape),)
    shown = studio.frames(run, found.codes)
    assert [count for count, _ in shown] == list(range(1, math.prod(shape) + 1))
    assert (shown[-1][1] == found.reconstruction).all()
    # A cell shows at its first code: of two codes in each, or of the coarse grid of one cell.
    for count, frame in shown:
        hidden = max(0, 4 - math.ceil(count / 2)) if settings.get("depth") else 0
        corners = [slice(0, 4), slice(4, 8)]
        cells = [frame[rows, columns] for rows in corners for columns in corners]
        assert sum((cell == GRAY).all() for cell in cells) == hidden


def test_uploads(run, tmp_path):
    path = tmp_path / "wide.jpg"
    Image.new("RGB", (30, 20), "red").save(path)
    made = studio.uploaded(str(path), run.config)
    assert made.shape == (SIDE, SIDE, 3) and np.abs(made - [254.0, 0, 0]).max() <= 2
    (tmp_path / "broken.jpg").write_bytes(path.read_bytes()[:300])
    with pytest.raises(VqbeamError) as refused:
        studio.uploaded(str(tmp_path / "broken.jpg"), run.config)
    assert re.match(r"broken\.jpg cannot be used \(.*\); give another image$", str(refused.value))


def test_a_port_in_use(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(VqbeamError, match=f"^port {port} cannot be used; choose another"):
            studio.serve(studio.build(run), port)


@pytest.mark.system
def test_the_command_says_its_address_and_ends_at_ctrl_c(finished_run, interruptible, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log, place = tmp_path / "log", tmp_path / "files"
    place.mkdir()
    environment = {"TMPDIR": str(place)}
    with started(
        log, "studio", finished_run.root, "--port", port, environment=environment
    ) as process:
        end = time.monotonic() + 200
        while "Ctrl-C" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))  # is this machine, too
        for size, status in ((9_000_000, 200), (11_000_000, 413)):
            files = {"files": ("a.png", bytes(size))}
            assert httpx.post(f"{address}/gradio_api/upload", files=files).status_code == status
        with socket.create_connection(("127.0.0.1", port)):
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0  # about a second on a machine at rest
    assert log.read_text() == f"studio of {finished_run.root}: {address}  (Ctrl-C ends it)\n"
    assert [path for path in place.rglob("*") if path.is_file()] == []
