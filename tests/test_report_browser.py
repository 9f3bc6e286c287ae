"""The report in Chromium, as a person sees it; skipped where there is no browser."""

import shutil

import pytest
from report_pages import Page

from vqbeam.pipelines.report.page import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
if not BROWSER:
    pytest.skip("needs the Debian package chromium", allow_module_level=True)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs pip install -e .[test-browser]"
)

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def files(finished_run, tmp_path_factory):
    """The page about a run, and that about two."""
    folder = tmp_path_factory.mktemp("pages")
    root = str(finished_run.root)
    report([root], str(folder / "one.html"))
    report([root, root], str(folder / "two.html"))
    return {number: folder / f"{name}.html" for number, name in ((1, "one"), (2, "two"))}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # As root, Chromium cannot have its sandbox.
        options = dict(executable_path=BROWSER, args=["--no-sandbox"])
        with started.chromium.launch(**options) as opened:
            yield opened


@pytest.fixture
def opened(browser, files):
    """Opens a page; at the end, it must have made no request and no complaint."""
    pages, heard = [], []

    def open(runs=1, width=1400, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(files[runs].as_uri())
        return page

    yield open
    own = {file.as_uri() for file in files.values()}
    assert [what for what in heard if what not in own and not what.startswith("data:")] == []
    for page in pages:
        page.close()


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_nothing_sticks_out(opened, runs, width, color_scheme):
    page = opened(runs, width, color_scheme=color_scheme)
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def test_pointing_at_a_chart_shows_its_value(opened, finished_run):
    page = opened()
    tip = page.locator("#tip")
    assert not tip.is_visible()
    page.locator("#training svg").first.locator(".mark").first.hover()
    epoch = finished_run.manifest("train-vqvae")["history"][0]
    expected = f"epoch 1, 2 steps: {epoch['loss']:.4g} training, {epoch['val_loss']:.4g} held out"
    assert tip.is_visible() and tip.inner_text() == expected
    page.locator("h1").hover()
    assert not tip.is_visible()
    page.locator("#codebook .mark").first.hover()
    assert tip.inner_text().startswith("codes 1 by use: ")


def test_the_arrow_keys_move_through_a_chart(opened, finished_run):
    page = opened()
    page.locator("#training svg").nth(1).focus()
    history = finished_run.manifest("train-prior")["history"]
    for key, number in ((None, 2), ("ArrowLeft", 1), ("ArrowLeft", 1), ("ArrowRight", 2)):
        if key:
            page.keyboard.press(key)
        said = page.locator("#tip").inner_text()
        assert said.startswith(f"epoch {number}, ")
        assert f"{history[number - 1]['val_loss']:.4g} held out" in said
    page.keyboard.press("Tab")
    assert not page.locator("#tip").is_visible()


def test_the_slider_moves_between_originals_and_reconstructions(opened):
    page = opened()
    slider, pair = page.locator("input[type=range]"), page.locator(".pair").first

    def middle():
        """The pixel shown in the middle of the first picture's right half."""
        box = pair.bounding_box()
        spot = {"x": box["x"] + 0.7 * box["width"], "y": box["y"] + 0.5 * box["height"]}
        return page.screenshot(clip=spot | {"width": 1, "height": 1})

    slider.scroll_into_view_if_needed()
    shown = {}
    for share in (0, 50, 100):
        slider.fill(str(share))
        clip = pair.locator(".top").evaluate("element => getComputedStyle(element).clipPath")
        assert clip == f"inset(0px {100 - share}% 0px 0px)"
        shown[share] = middle()
    assert shown[0] == shown[50] != shown[100]


def contrast(page, selector):
    """The contrast of a text with the page, by WCAG 2."""

    def luminance(colour):
        channels = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = "element => getComputedStyle(element).{}"
    text = luminance(page.locator(selector).first.evaluate(style.format("color")))
    paper = luminance(page.locator("body").evaluate(style.format("backgroundColor")))
    return (max(text, paper) + 0.05) / (min(text, paper) + 0.05)


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_texts_stand_out(opened, color_scheme):
    page = opened(color_scheme=color_scheme)
    for selector in ("p.lead", "summary", "h2", "small", ".checks .fault a", ".checks .good"):
        assert contrast(page, selector) >= 4.5, selector


def test_it_prints(opened):
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator(".slider").first.is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_the_page_reads_without_scripts(opened, files):
    page = opened(java_script_enabled=False)
    assert page.locator("#training details").first.is_visible()
    assert len(page.locator("svg").all()) == len(Page(files[1].read_text()).all("svg"))
