"""The studio in Chromium, as a person uses it; skipped where there is no browser."""

import io
import shutil
import socket

import numpy as np
import pytest
from PIL import Image
from test_harmful_images import REFUSED

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
if not BROWSER:
    pytest.skip("needs the Debian package chromium", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs pip install -e .[test-browser]"
)
gradio_client = pytest.importorskip("gradio_client", reason="needs pip install -e .[studio]")

studio = pytest.importorskip("vqbeam.pipelines.studio")

pytestmark = pytest.mark.system

WAIT = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def address(finished_run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        port = free.getsockname()[1]
        free.close()
        page = studio.build(studio.opened(str(finished_run.root)))
        studio.serve(page, port)
        yield f"http://127.0.0.1:{port}"
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # As root, Chromium cannot have its sandbox.
        options = dict(executable_path=BROWSER, args=["--no-sandbox"])
        with started.chromium.launch(**options) as opened:
            playwright.expect.set_options(timeout=WAIT)
            yield opened


@pytest.fixture
def opened(browser, address):
    """Opens the page; at the end, it must not have complained or asked another host."""
    pages, heard = [], []

    def open(width=1400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(WAIT)
        pages.append(page)
        page.on("console", lambda said: heard.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(address)
        page.locator("[role=tab]").locator("visible=true").first.wait_for()
        return page

    yield open
    own = (address, "data:", "blob:")
    assert [what for what in heard if not what.startswith(own)] == []
    for page in pages:
        page.close()


def shown(page, selector):
    """The elements that are to be seen; those of other tabs are not."""
    return page.locator(selector).locator("visible=true")


def to_tab(page, name):
    """Goes to a tab, which on a narrow page is in a menu."""
    tab = shown(page, f"[role=tab]:text-is('{name}')")
    if not tab.count():
        shown(page, "button[aria-label='More tabs']").click()
        tab = shown(page, f".overflow-dropdown button:text-is('{name}')")
    tab.first.click()


def press(page, name):
    shown(page, f"button.lg:text-is('{name}')").click()


def pixels(page, image):
    """The pixels of a picture on the page, uint8 [H, W, 3]."""
    data = page.request.get(image.get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tiles(page, count):
    """The pictures of the gallery to be seen, once there are so many."""
    playwright.expect(shown(page, "button.thumbnail-item")).to_have_count(count)
    return shown(page, "button.thumbnail-item img")


def changed(page, image, before):
    """The picture's new address, once it has one."""
    playwright.expect(image).not_to_have_attribute("src", before)
    return image.get_attribute("src")


def test_sampling_and_keeping_the_seed(opened):
    page = opened()
    page.get_by_text("Settings of the sampler").click()
    seed = page.get_by_label("Seed", exact=True)
    assert seed.input_value() == "0"
    press(page, "Sample")
    images = tiles(page, 16)
    assert seed.input_value() != "0"
    first, source = pixels(page, images.first), images.first.get_attribute("src")
    assert first.shape == (256, 256, 3) and (first[::32] == first[31::32]).all()
    captions = shown(page, "button.thumbnail-item").all_inner_texts()
    assert [text.strip() for text in captions[:4]] == ["Banana", "apple", "cherry", "Banana"]
    page.get_by_label("Keep the seed").check()
    page.get_by_label("Number of images").first.fill("8")
    press(page, "Sample")
    images = tiles(page, 8)
    assert images.first.get_attribute("src") == source  # its name is that of its pixels


def paint(page):
    """Paints a stroke over the middle of the picture."""
    box = shown(page, "canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    page.mouse.move(x - 30, y - 30, steps=5)
    page.mouse.up()


def test_completing_a_painted_part(opened):
    page = opened()
    to_tab(page, "Complete")
    press(page, "Take a sample")
    shown(page, "button[aria-label='Brush']").wait_for()
    page.wait_for_timeout(2000)
    shown(page, "canvas").first.scroll_into_view_if_needed()
    paint(page)
    press(page, "Complete")
    images = tiles(page, 9)
    kept = pixels(page, images.first)
    gray = (kept == 128).all(axis=-1)
    assert gray[:128, :128].all() and not gray[128:, 128:].all()
    for index in range(1, 9):
        assert (pixels(page, images.nth(index)) != kept)[:128, :128].any()


def test_swapping_a_code(opened):
    page = opened()
    to_tab(page, "Codes")
    press(page, "Take a sample")
    figures = shown(page, ".image-frame img, .image-container img")
    playwright.expect(figures).to_have_count(2)
    grid, plain = figures.first, figures.nth(1)
    before, source = pixels(page, plain), plain.get_attribute("src")
    box = grid.bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"])
    images = tiles(page, 12)
    # The code that stands there is one of the twelve.
    wanted = [pixels(page, images.nth(index)) for index in range(12)]
    other = next(i for i in range(12) if (wanted[i] != before[::2, ::2]).any())
    images.nth(other).click()
    changed(page, plain, source)
    assert (pixels(page, plain)[::2, ::2] == wanted[other]).all()
    press(page, "Start again")
    playwright.expect(shown(page, "button.thumbnail-item")).to_have_count(0)
    assert (pixels(page, plain) == before).all()


@pytest.mark.parametrize("name", ["bomb.png", "claims.tif"])
def test_a_hostile_upload_is_a_sentence(opened, tmp_path, name):
    make, reason = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    page = opened()
    to_tab(page, "Likelihood")
    with page.expect_file_chooser() as chooser:
        press(page, "Upload an image")
    chooser.value.set_files(tmp_path / name)
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert f"{name} cannot be used ({reason}); give another image" in toast.inner_text()
    press(page, "Take a sample")
    tiles(page, 3)


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_sticks_out(opened, width):
    page = opened(width)
    for tab, button, count in (
        ("Sample", "Sample", 16),
        ("Complete", "Take a sample", 0),
        ("Between two classes", "Walk", 0),
        ("Codes", "Take a sample", 0),
        ("Likelihood", "Take a sample", 3),
        ("Watch", "Sample one image", 0),
    ):
        to_tab(page, tab)
        press(page, button)
        if count:
            tiles(page, count)
        elif tab != "Complete":
            shown(page, ".image-frame img, .image-container img").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width, tab


def test_fifty_requests_at_once(address, opened):
    def ask():
        return client.submit(8, -1, 5, True, 1.0, 1.0, 0, 1.0, 0.0, api_name="/sample")

    # The same images have the same file, which a download may meet while it is written again.
    options = dict(max_workers=50, download_files=False)
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False, **options)
    ends = [(job, job.exception(timeout=WAIT / 1000)) for job in [ask() for _ in range(50)]]
    done = [job.result()[1] for job, error in ends if error is None]
    refused = [str(error) for _, error in ends if error is not None]
    # One at a time; about twenty may wait.
    assert len(done) >= 10 and len(done) + len(refused) == 50
    assert all("queue" in said.lower() for said in refused), refused
    assert all(len(images) == 8 for images in done)
    page = opened()
    press(page, "Sample")
    tiles(page, 16)
