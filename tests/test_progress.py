"""What is shown of a computation, in a log and in terminals of several widths."""

import io
import os
import pty
import re
import sys
import termios

import pytest

from vqbeam.vqvae.fitting import progress
from vqbeam.vqvae.fitting.progress import FitProgress, ProgressBar, clock, fitting


@pytest.fixture
def clock_of_test(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def terminal(monkeypatch):
    """Function from a width to a function that returns what was written to a terminal of it."""
    opened = []

    def of(width):
        leader, follower = pty.openpty()
        termios.tcsetwinsize(follower, (24, width))
        screen = os.fdopen(follower, "w", encoding="utf-8")
        opened.extend([screen, leader])
        monkeypatch.setattr(sys, "stderr", screen)

        def read():
            print("<end>", file=screen, flush=True)
            text = ""
            while "<end>" not in text:
                text += os.read(leader, 1 << 20).decode()
            return text.partition("<end>")[0]

        return read

    yield of
    screen, leader = opened
    monkeypatch.undo()
    screen.close()
    os.close(leader)


def drawn(text):
    """The states of the bar that were drawn, and the lines that stayed, in their order."""
    return [part for part in re.split(r"\r\033\[K|\r?\n", text) if part]


def test_a_log_gets_whole_lines_at_most_every_30_seconds(clock_of_test, capsys):
    with ProgressBar("prepare", 1000) as bar:
        for second in range(100):
            clock_of_test.now = 1000.0 + second
            bar.update(10)
    text = capsys.readouterr().err
    assert "\r" not in text and "\033" not in text
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == ["31%", "61%", "91%", "100%"]
    # 10 images a second since the first update.
    assert lines[1] == "prepare      61%  0:39 left  10 images/s  610 of 1,000 images"


def test_the_time_in_all_is_that_of_the_bar_and_of_what_follows(clock_of_test, capsys, monkeypatch):
    monkeypatch.setitem(progress.seconds_after, "encode", 100.0)
    bar = ProgressBar("encode", 90)
    bar.update(10)
    clock_of_test.now += 40
    bar.update(20)
    assert (
        "encode       33%  2:00 left  3:40 in all  0.5 images/s  30 of 90 images"
        in capsys.readouterr().err
    )


def test_the_time_left_comes_from_the_plan_first_and_from_the_rate_in_the_end(
    clock_of_test, monkeypatch
):
    monkeypatch.setitem(progress.seconds_of_bar, "decoder", 300.0)
    bar = ProgressBar("decoder", 1100, initial=100)  # of a training that was broken off
    bar.update(0)
    left = {}
    for images in (10, 490, 490):
        clock_of_test.now += images / 10  # 100 s in all at this rate
        bar.update(images)
        left[bar.n] = bar.seconds_left
    assert left == pytest.approx({110: 295, 600: 0.5 * (50 + 150), 1090: 1}, rel=0.03)


@pytest.mark.parametrize("width", [36, 60, 80, 120])
def test_figures_come_first_and_the_bar_takes_the_rest(terminal, width, clock_of_test):
    read = terminal(width)
    bar = ProgressBar("train vqvae", 10_000)
    bar.figures = ["loss 0.0685", "held out 0.0601"]
    bar.update(1000)
    clock_of_test.now += 10
    bar.update(4000)
    state = drawn(read())[-1]
    assert len(state) == width - 1
    assert state.startswith("train vqvae  50%")
    for text, least in (("loss 0.0685", 41), ("0:12 left", 60), ("held out 0.0601", 80)):
        assert (text in state) == (width >= least), text
    filled, blocks = re.search(r"\|((█*)[^|]*)\|$", state).groups()
    assert len(filled) >= 8
    assert abs(len(blocks) - len(filled) / 2) <= 1


def test_a_terminal_without_blocks(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    ascii_only.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", ascii_only)
    with ProgressBar("encode", 10) as bar:
        bar.update(10)
    ascii_only.flush()
    assert b"###|" in ascii_only.buffer.getvalue()


def epochs(bar, count, clock_of_test=None, seconds=0.0):
    logs = {"loss": 0.06854, "val_loss": 0.06012}
    for epoch in range(count):
        bar.on_epoch_begin(epoch)
        for batch in range(4):
            if clock_of_test:
                clock_of_test.now += seconds / 4
            bar.on_train_batch_end(batch, logs)
        bar.on_epoch_end(epoch, logs)
    bar.on_train_end()


FIGURES = ["PSNR 22.4 dB", "179 of 256 codes used"]


def training():
    return FitProgress(
        "train vqvae", steps=12, batch_size=50, per_epoch=4, figures=lambda _: FIGURES
    )


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (
            120,
            "epoch 2 of 3  step 8 of 12  loss 0.0685  held out 0.0601  PSNR 22.4 dB  "
            "179 of 256 codes used",
        ),
        (80, "epoch 2 of 3  loss 0.0685  held out 0.0601  PSNR 22.4 dB  179 of 256 codes used"),
        (60, "epoch 2 of 3  loss 0.0685  held out 0.0601  PSNR 22.4 dB"),
    ],
)
def test_a_line_for_each_epoch_stays_in_a_terminal(terminal, width, shown):
    read = terminal(width)
    epochs(training(), 3)
    lines = [line for line in drawn(read()) if line.startswith("epoch")]
    assert [line.split(" of ")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    assert lines[1] == shown


def test_the_last_epoch_of_a_log_is_told_and_others_every_30_seconds(clock_of_test, capsys):
    epochs(training(), 3, clock_of_test, seconds=16)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:12] for line in lines] == ["train vqvae ", "epoch 3 of 3"]  # and no "100%" more
    assert lines[1].startswith("epoch 3 of 3  step 12 of 12  loss 0.0685  held out 0.0601  PSNR 22")


def test_a_training_tells_its_time_after_its_first_seconds(monkeypatch, capsys):
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(ticks)))
    bar = FitProgress("classifier", steps=100, batch_size=10)
    for batch in range(10):
        bar.on_train_batch_end(batch, {"loss": 1.0})
    # The first call compiles; three more take 6 seconds, and 96 are left.
    told = [line for line in capsys.readouterr().err.splitlines() if "steps left" in line]
    assert told == ["classifier: 96 steps left, about 3:12"]


def test_texts_that_do_not_fit_are_left_out_from_the_last_on():
    assert fitting(["abc", "de", "f"], None) == ["abc", "de", "f"]
    assert fitting(["abc", "de", "f"], 10) == ["abc", "de", "f"]
    assert fitting(["abc", "de", "f"], 9) == ["abc", "de"]
    assert fitting(["abc", "de", "f"], 1) == ["abc"]


def test_times():
    assert [clock(s) for s in (0.4, 59.6, 200, 3800)] == ["0:00", "1:00", "3:20", "1:03:20"]
