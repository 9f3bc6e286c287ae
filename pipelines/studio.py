"""The command that serves a page in the browser for trying out a trained run."""

import contextlib
import functools
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
import matplotlib
import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError, override
from vqbeam.pipelines.sampling.api import Run, Samples
from vqbeam.pipelines.sampling.complete import kept_part
from vqbeam.pipelines.sampling.input_images import read_image, unpainted_cells
from vqbeam.pipelines.sampling.interpolate import row_figure
from vqbeam.prior.training import bits_per_dim
from vqbeam.vqvae.figures import code_figure, enlarged
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.labels import Label, label_name, labels_for, parse_label

# All work is done in batches of this size, so that each program is compiled only once.
BATCH = 8
# Maximum number of samples, of codes to choose from, and of frames.
MOST = 64
_QUEUE = 20
_SETTINGS = ("temperature", "guidance", "top_k", "top_p", "min_p")
_ANY = -1
# Gradio's own galleries have the same number of columns at any width, and scroll.
_STYLE = """
img, canvas { image-rendering: pixelated }
.codes textarea { font-family: monospace; white-space: pre; overflow-x: auto }
.fixed-height { min-height: 0 !important; max-height: none !important }
.grid-container {
  --tile: max(100px, 11%);
  grid-template: none / repeat(auto-fill, minmax(var(--tile), 1fr)) !important;
}
.sheet .fixed-height { max-height: 70vh !important }
.large .grid-container { --tile: max(100px, 30%) }
"""


def studio(run_dir: str, port: int) -> None:
    """Serves the page, on this machine only, until Ctrl-C.

    Args:
        run_dir: Folder of a run with both models.
        port: The port of 127.0.0.1.

    Raises:
        VqbeamError: The run lacks a model, or the port is not free.
    """
    run = opened(run_dir)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads and the images shown
        serve(build(run), port)
        print(f"studio of {run_dir}: http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    os._exit(0)  # an ordinary exit would wait for open pages and for images being sampled


def serve(page: gr.Blocks, port: int) -> None:
    """Starts serving a page on 127.0.0.1, and returns.

    Raises:
        VqbeamError: The port is not free.
    """
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size="10mb",
            state_session_capacity=100,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            css=_STYLE,
        )
    except OSError as error:
        raise VqbeamError(f"port {port} cannot be used; choose another with --port") from error


def opened(run_dir: str) -> Run:
    """Returns a run that works in small batches, with its models loaded."""
    run = Run(run_dir)
    run.config = override(run.config, {"encode.batch_size": BATCH})
    # Loaded now, to report a damaged file at once, and because Keras needs the main thread.
    assert run.vqvae and run.prior
    return run


# What the tabs compute.


def uploaded(path: str, config: Config) -> np.ndarray:
    """Returns an uploaded image in the shape of the run's images, uint8 [H, W, C].

    Raises:
        VqbeamError: It cannot be decoded, or is too large to decode.
    """
    try:
        return read_image(epath.Path(path), config)
    except VqbeamError as error:
        raise VqbeamError(str(error).replace(path, os.path.basename(path))) from error


def completed(
    run: Run, image: np.ndarray, painted: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kept part of an image, [H, W, C], and its completions, [8, H, W, C].

    Args:
        run: The run.
        image: uint8 [H, W, C].
        painted: Bool, of any height and width; see `unpainted_cells`.
        **options: See `Run.complete`.
    """
    cells = unpainted_cells(painted, run.config.grid)
    if cells.all():
        raise VqbeamError("nothing is painted over; paint over the part that is to be sampled")
    keep = np.kron(cells, np.ones([run.config.vqvae.downsampling] * 2)) > 0
    made = run.complete(image[None], keep, num=BATCH, batch_size=BATCH, **options)
    return kept_part(image[None], cells)[0], made[0]


class Choice(NamedTuple):
    """The possible codes at one position of a grid, most likely first.

    Attributes:
        codes: int [N], all codes, or the 64 most likely ones.
        probabilities: float [N], the probability of each, given the codes before it.
        images: uint8 [N, h, w, C], the surrounding part of the image with each code.
    """

    codes: np.ndarray
    probabilities: np.ndarray
    images: np.ndarray


def choice(run: Run, codes: np.ndarray, cell: tuple[int, int], label: Label) -> Choice:
    """Returns the possible codes at a cell of an image's codes, int32 [rows, columns]."""
    position = cell[0] * codes.shape[1] + cell[1]
    nats = _log_probabilities(run, codes, label)[position]
    likely = np.argsort(-nats, kind="stable")[:MOST]
    each = np.repeat(codes[None], len(likely), axis=0)
    each[:, cell[0], cell[1]] = likely
    rows, columns = neighbourhood(cell, run.config.vqvae.downsampling)
    return Choice(likely, np.exp(nats[likely]), run.decode(each)[:, rows, columns])


def neighbourhood(cell: tuple[int, int], step: int) -> tuple[slice, slice]:
    """Returns rows and columns of the pixels of a cell and its neighbours of `step` pixels."""
    rows, columns = (slice(max(0, place - 1) * step, (place + 2) * step) for place in cell)
    return rows, columns


class Reading(NamedTuple):
    """The codes, the reconstruction and the likelihood of an image.

    Attributes:
        codes: int32 [*layout.shape].
        reconstruction: uint8 [H, W, C].
        nats: −log p(code | label, previous codes) of each code, float32 [T].
        bits_per_dim: Bits per value of the image (H·W·C values).
    """

    codes: np.ndarray
    reconstruction: np.ndarray
    nats: np.ndarray
    bits_per_dim: float


def reading(run: Run, image: np.ndarray, label: Label) -> Reading:
    """Returns the codes of an image [H, W, C], their reconstruction and their likelihood."""
    codes = run.encode(image[None])[0]
    found = _log_probabilities(run, codes, label)
    nats = -np.take_along_axis(found, codes.reshape(-1, 1), axis=1)[:, 0]
    bits = bits_per_dim(float(nats.mean()), run.prior.layout, run.config)
    return Reading(codes, run.decode(codes[None])[0], nats, bits)


def heat_maps(
    nats: np.ndarray, layout: CodeLayout, image_shape: tuple[int, ...]
) -> list[np.ndarray]:
    """Returns the nats [T] as an image for each grid, uint8 [H, W, 3]; bright means high.

    The nats of several codes in one cell are added.
    """
    maps = []
    ends = np.cumsum([rows * columns * layout.depth for rows, columns in layout.grids])
    for grid, part in zip(layout.grids, np.split(nats, ends[:-1]), strict=True):
        cells = part.reshape(*grid, -1).sum(axis=-1)
        colours = matplotlib.colormaps["inferno"](cells / max(cells.max(), 1e-9), bytes=True)
        pixels = [side // count for side, count in zip(image_shape[:2], grid, strict=True)]
        maps.append(np.kron(colours[..., :3], np.ones((*pixels, 1), np.uint8)))
    return maps


def frames(run: Run, codes: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Returns images that show how an image grows while its codes are sampled.

    Codes that are not sampled yet are replaced by the last one, and their cells are gray. A cell
    with several codes appears with the first of them, and then gets sharper.

    Args:
        run: The run.
        codes: The codes of one image, int32 [*layout.shape].

    Returns:
        Up to 64 pairs of the number of codes so far and an image, uint8 [H, W, C].
    """
    layout = run.prior.layout
    flat, (rows, columns) = codes.ravel(), layout.grids[0]
    lengths = np.unique(np.linspace(1, len(flat), MOST).astype(int))
    known = np.arange(len(flat)) < lengths[:, None]
    images = run.decode(
        np.where(known, flat, flat[lengths - 1][:, None]).reshape(-1, *layout.shape)
    )
    first = known[:, : rows * columns * layout.depth : layout.depth]
    shown = zip(lengths.tolist(), images, first.reshape(-1, rows, columns), strict=True)
    return [(length, kept_part(image[None], cells)[0]) for length, image, cells in shown]


def _log_probabilities(run: Run, codes: np.ndarray, label: Label) -> np.ndarray:
    """Returns the log-probabilities of all codes at each position of one image, [T, K]."""
    return run.code_log_probabilities(codes[None], np.asarray([label], np.int32))[0]


# The page, with one function for each tab.


def build(run: Run) -> gr.Blocks:
    """Returns the page of a run from `opened`."""
    shape, layout = run.config.image_shape, run.prior.layout
    with gr.Blocks(title=f"vqbeam studio: {run.path.name}", analytics_enabled=False) as page:
        gr.Markdown(
            f"# {run.path.name}\n{run.config.name}, images of {shape[0]}×{shape[1]} pixels, "
            f"{layout.describe()}. The first images of each kind take longer, since a program is "
            "compiled for them."
        )
        panel = _panel(run)
        with gr.Tabs():
            sample = _sample_tab(run, panel)
            _complete_tab(run, panel, sample)
            if run.prior_labels.names:
                _between_tab(run, panel)
            _codes_tab(run, panel, sample)
            _likelihood_tab(run, panel, sample)
            _watch_tab(run, panel)
    return page.queue(max_size=_QUEUE)


def _panel(run: Run) -> list[gr.components.Component]:
    """Adds the inputs shared by all tabs, whose values are the arguments of `_asked`."""
    own, prior = run.default_settings(), run.config.prior
    guided, top = bool(run.prior_labels.names and prior.label_dropout), max(10, own.guidance)
    with gr.Accordion("Settings of the sampler", open=False):
        with gr.Row():
            label = _label_input(run, "Class")
            seed = gr.Number(run.config.seed, label="Seed", precision=0, minimum=0)
            keep = gr.Checkbox(label="Keep the seed, for the same images again")
        with gr.Row():
            sliders = [
                gr.Slider(
                    0, max(2, own.temperature), own.temperature, step=0.01, label="Temperature"
                ),
                gr.Slider(0, top, own.guidance, step=0.05, label="Guidance", visible=guided),
                gr.Slider(0, run.prior.layout.num_codes, own.top_k, step=1, label="Top-k"),
                gr.Slider(0.005, 1, own.top_p, step=0.005, label="Top-p"),
                gr.Slider(0, 0.995, own.min_p, step=0.005, label="Min-p"),
            ]
    return [label, seed, keep, *sliders]


def _label_input(run: Run, title: str, value: int = _ANY) -> gr.components.Component:
    names, kind = run.prior_labels
    choices = [(name, number) for number, name in enumerate(names)]
    if kind == "attributes":
        return gr.Dropdown(choices, value=[], multiselect=True, label=title)
    shown = bool(names)
    return gr.Dropdown([("any", _ANY), *choices], value=value, label=title, visible=shown)


def _asked(
    run: Run, label: Any, seed: int, keep: bool, *values: float
) -> tuple[Any, int, dict[str, float]]:
    """Returns the label (None for any), the seed and the settings from the inputs of `_panel`."""
    seed = seed if keep else random.randrange(1_000_000)
    return _label(run, label), seed, dict(zip(_SETTINGS, values, strict=True))


def _label(run: Run, chosen: Any) -> Label | None:
    if run.prior_labels.kind == "attributes":
        numbers = range(len(run.prior_labels.names))
        return tuple(int(number in chosen) for number in numbers) if chosen else None
    return None if chosen == _ANY else chosen


def _one(run: Run, label: Any, seed: int, settings: dict[str, float]) -> Samples:
    """Returns samples of one class, which is chosen by the seed if `label` is None."""
    if label is None:
        (label,) = labels_for(None, run.prior_labels, 1, first=seed)
    return run.sample(BATCH, [label], seed, batch_size=BATCH, **settings)


def _connect(trigger: Callable[..., Any], function: Callable[..., Any], *ends: Any) -> Any:
    """Connects a function to an event. One runs at a time, and the page shows its errors."""

    @functools.wraps(function)
    def told(*values):
        try:
            return function(*values)
        except VqbeamError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return trigger(told, *ends, concurrency_limit=1, concurrency_id="run")


def _sample_tab(run: Run, panel: list) -> gr.State:
    with gr.Tab("Sample"):
        number = gr.Slider(BATCH, MOST, 16, step=BATCH, label="Number of images")
        button = gr.Button("Sample", variant="primary")
        gr.Markdown("Click on a sample to take it to the other tabs.")
        shown = _gallery()
        images, selected = gr.State(), gr.State()

    def sample(number, *asked):
        label, seed, settings = _asked(run, *asked)
        labels = None if label is None else [label]
        made = run.sample(number, labels, seed, batch_size=BATCH, **settings)
        tiles = _tiles(made.images, made.names or [""] * number)
        return seed, tiles, made.images, made.images[0]

    def select(images, event: gr.SelectData):
        return images[event.index]

    _connect(button.click, sample, [number, *panel], [panel[1], shown, images, selected])
    _connect(shown.select, select, images, selected)
    return selected


def _source(run: Run, panel: list, sample: gr.State) -> tuple[gr.State, list]:
    """Adds two ways to choose an image; returns its state and the events that set it."""
    with gr.Row():
        upload = gr.UploadButton("Upload an image", file_types=["image"])
        take = gr.Button("Take a sample")
    image = gr.State()

    def taken(sample, *asked):
        if sample is not None:
            return sample
        return _one(run, *_asked(run, *asked)).images[0]

    read = _connect(upload.upload, lambda path: uploaded(path, run.config), upload, image)
    return image, [read, _connect(take.click, taken, [sample, *panel], image)]


def _complete_tab(run: Run, panel: list, sample: gr.State) -> None:
    with gr.Tab("Complete"):
        image, events = _source(run, panel, sample)
        gr.Markdown("Paint over the part that is to be sampled.")
        with gr.Row():
            with gr.Column(min_width=320):
                editor = _editor()
                button = gr.Button("Complete", variant="primary")
            with gr.Column(min_width=320):
                shown = _gallery("large")

    def complete(image, editor, *asked):
        _check_chosen(image)
        label, seed, settings = _asked(run, *asked)
        layers = [layer[..., 3] > 0 for layer in editor["layers"]]
        painted = np.any(layers, axis=0) if layers else np.zeros((1, 1), bool)
        kept, made = completed(run, image, painted, label=label, seed=seed, **settings)
        return seed, _tiles([kept, *made], ["kept", *[""] * BATCH])

    for event in events:
        _connect(event.success, enlarged, image, editor)
    _connect(button.click, complete, [image, editor, *panel], [panel[1], shown])


def _between_tab(run: Run, panel: list) -> None:
    with gr.Tab("Between two classes"):
        with gr.Row():
            start = _label_input(run, "From", 0)
            end = _label_input(run, "To", len(run.prior_labels.names) - 1)
        with gr.Row():
            steps = gr.Slider(4, 12, 8, step=1, label="Steps", min_width=240)
            rows = gr.Slider(2, 6, 3, step=1, label="Rows", min_width=240)
        button = gr.Button("Walk", variant="primary")
        shown = _figure("rows of images from one class to the other")

    def walk(start, end, steps, rows, *asked):
        _, seed, settings = _asked(run, *asked)
        known = run.prior_labels
        ends = [parse_label(_label(run, one), known) for one in (start, end)]
        options = dict(steps=steps, seed=seed, batch_size=BATCH)
        images = run.interpolate(*ends, rows, **options, **settings)
        return seed, row_figure(images, *(label_name(one, known) or "any" for one in ends))

    _connect(button.click, walk, [start, end, steps, rows, *panel], [panel[1], shown])


def _codes_tab(run: Run, panel: list, sample: gr.State) -> None:
    layout = run.prior.layout
    with gr.Tab("Codes"):
        if len(layout.shape) != 2:
            sentence = "only a single grid with one code in each cell is shown here."
            gr.Markdown(f"This run has: {layout.describe()}; {sentence}")
            return
        image, events = _source(run, panel, sample)
        gr.Markdown(
            "Click on a cell to see what other codes would look like there, and how likely each is "
            "after the codes before it. Click on one of them to replace the code."
        )
        with gr.Row():
            with gr.Column(min_width=320):
                grid = _figure("the grid of codes")
            with gr.Column(min_width=320):
                plain = _figure("the decoded image")
        again = gr.Button("Start again")
        sheet = _gallery("sheet")
        codes, cell, offered = gr.State(), gr.State(), gr.State()

    def drawn(codes, cell=None):
        image = run.decode(codes[None])[0]
        return code_figure(image, codes, cell), enlarged(image)

    def show(image):
        _check_chosen(image)
        made = run.encode(image[None])[0]
        return made, [], *drawn(made)

    def look(codes, label, event: gr.SelectData):
        _check_chosen(codes)
        figure, _ = drawn(codes)
        x, y = np.minimum(event.index, np.subtract(figure.size, 1)).tolist()
        cell = y * codes.shape[0] // figure.height, x * codes.shape[1] // figure.width
        found = choice(run, codes, cell, run.completion_label(_label(run, label)))
        shares = zip(found.codes, found.probabilities, strict=True)
        names = [f"{code}: {share:.1%}" for code, share in shares]
        return cell, found.codes, drawn(codes, cell)[0], _tiles(found.images, names)

    def swap(codes, cell, offered, event: gr.SelectData):
        changed = codes.copy()
        changed[cell] = offered[event.index]
        return changed, *drawn(changed, cell)

    shown = [codes, sheet, grid, plain]
    for event in events:
        _connect(event.success, show, image, shown)
    _connect(again.click, show, image, shown)
    _connect(grid.select, look, [codes, panel[0]], [cell, offered, grid, sheet])
    _connect(sheet.select, swap, [codes, cell, offered], [codes, grid, plain])


def _likelihood_tab(run: Run, panel: list, sample: gr.State) -> None:
    with gr.Tab("Likelihood"):
        image, events = _source(run, panel, sample)
        said = gr.Markdown()
        shown = _gallery("large")
        codes = gr.Textbox(label="Codes", lines=8, max_lines=20, elem_classes="codes")

    def read(image, label):
        row = run.completion_label(_label(run, label))
        found = reading(run, image, row)
        nats, given = found.nats, label_name(row, run.prior_labels)
        text = (
            f"log p(codes{' | ' * bool(given)}{given}) = {-nats.sum():.1f} nats: {nats.mean():.2f} "
            f"nats per code, **{found.bits_per_dim:.3f} bits per dimension**. In the heat map, "
            f"bright codes are those that the prior did not expect (up to {nats.max():.1f} nats)."
        )
        maps = heat_maps(nats, run.prior.layout, run.config.image_shape)
        titles = ["image", "reconstruction", *["nats per code"] * len(maps)]
        listed = np.array2string(found.codes, threshold=10_000, max_line_width=10_000)
        return text, _tiles([image, found.reconstruction, *maps], titles), listed

    for event in events:
        _connect(event.success, read, [image, panel[0]], [said, shown, codes])


def _watch_tab(run: Run, panel: list) -> None:
    with gr.Tab("Watch"):
        button = gr.Button("Sample one image", variant="primary")
        shown = _figure("the image so far, gray where codes are missing")
        made = gr.State()

    def sample(*asked):
        label, seed, settings = _asked(run, *asked)
        codes = _one(run, label, seed, settings).codes[0]
        return seed, [image for _, image in frames(run, codes)]

    def play(images):
        for image in images:
            yield enlarged(image)
            time.sleep(0.05)

    event = _connect(button.click, sample, panel, [panel[1], made])
    event.success(play, made, shown, show_progress="hidden")


def _editor() -> gr.ImageEditor:
    return gr.ImageEditor(
        show_label=False,
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(48, ["#ff5a00"], color_mode="fixed"),
        format="png",
        canvas_size=(512, 512),
        height=420,
        interactive=True,
        buttons=[],
    )


def _gallery(kind: str | None = None) -> gr.Gallery:
    options = dict(show_label=False, interactive=False, allow_preview=False, buttons=[])
    return gr.Gallery(format="png", object_fit="contain", elem_classes=kind, **options)


def _figure(text: str) -> gr.Image:
    options = dict(show_label=False, interactive=False, buttons=["download"])
    return gr.Image(format="png", alt_text=text, **options)


def _tiles(images: Sequence[np.ndarray], captions: Sequence[str]) -> list:
    return [(enlarged(image, 256), text) for image, text in zip(images, captions, strict=True)]


def _check_chosen(image: np.ndarray | None) -> None:
    if image is None:
        raise VqbeamError("there is no image yet; upload one or take a sample")
