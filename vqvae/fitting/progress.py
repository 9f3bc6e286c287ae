"""Progress of a long computation: a bar in a terminal, whole lines in a log.

In a terminal, figures come first and the bar takes the rest of the width. A log gets at most one
line every 30 seconds, and one at the end.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

import keras

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 30.0
# Minimum width of a bar. Figures are left out before it gets narrower.
_LEAST_BAR = 8
_UNKNOWN_COLUMNS = 100
# A rate measured over less time is unreliable.
_LEAST_SECONDS = 0.5
# Seconds of training after which its duration is predicted.
_FIRST_SECONDS = 5.0

# Expected seconds by the title of a bar, from a command's plan: of the bar, and after its end.
seconds_of_bar: dict[str, float] = {}
seconds_after: dict[str, float] = {}


class ProgressBar:
    """Shows the number of images done, figures, and the time left.

    Args:
        title: Its label.
        total: Total number of images.
        initial: Images done before.

    Attributes:
        n: Images done.
        total: As given.
        figures: Texts such as "loss 0.0685", the most important first.
    """

    def __init__(self, title: str, total: int, initial: int = 0):
        self.title, self.total, self.n, self.initial = title, total, initial, initial
        self.figures: list[str] = []
        self._lock = threading.RLock()
        self._is_terminal = sys.stderr.isatty()
        self._begun: tuple[int, float] | None = None  # images done, and when that was
        self._shown = time.monotonic()
        self._drawn = False  # whether the bar is on the line of the cursor
        self._is_closed = False
        if self._is_terminal:
            self._draw()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, images: int) -> None:
        """Adds images, and shows the bar unless it was just shown."""
        with self._lock:
            self.n += images
            # The rate leaves out the first images, which may have waited for compilation.
            self._begun = self._begun or (self.n, time.monotonic())
            if self.is_due:
                self._show()

    @property
    def is_due(self) -> bool:
        """Whether the bar was last shown long enough ago to be shown again."""
        pause = _TERMINAL_SECONDS if self._is_terminal else _LOG_SECONDS
        return time.monotonic() - self._shown >= pause

    def say(self, line: str) -> None:
        """Prints a line that stays on the screen; the bar continues below it."""
        with self._lock:
            if self._drawn:
                sys.stderr.write("\r\033[K")
            self._write(line + "\n")
            self._drawn = False
            if self._is_terminal and not self._is_closed:
                self._draw()

    @property
    def width(self) -> int | None:
        """Maximum number of characters in a line; None in a log."""
        return _columns() - 1 if self._is_terminal else None

    def close(self, silently: bool = False) -> None:
        """Shows the final state, which stays on the screen, unless `silently`."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                if not silently:
                    self._show()
                if self._drawn:
                    self._write("\n")

    @property
    def rate(self) -> float | None:
        """Mean images per second since the first update; None if unknown."""
        if self._begun is None:
            return None
        images, seconds = self.n - self._begun[0], time.monotonic() - self._begun[1]
        return images / seconds if images and seconds >= _LEAST_SECONDS else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the bar; None if unknown.

        This is an average of the estimate by the mean rate and that of the plan, which includes
        interruptions such as validation. The more is done, the more the rate counts.
        """
        if not self.rate:
            return None
        images = self.total - self.initial
        by_rate = images / self.rate
        by_plan = seconds_of_bar.get(self.title, by_rate)
        done = (self.n - self.initial) / images
        return (1 - done) * (done * by_rate + (1 - done) * by_plan)

    def _show(self) -> None:
        if self._is_terminal:
            self._draw()
        else:
            self._write("  ".join(self._parts()) + "\n")

    def _draw(self) -> None:
        room = _columns() - 1  # a full line would wrap
        text = "  ".join(fitting(self._parts(), room - _LEAST_BAR - 3))
        bar = _bar(self.n / max(self.total, 1), room - len(text) - 3)
        self._write(f"\r\033[K{text} |{bar}|"[: room + 4])
        self._drawn = True

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
        self._shown = time.monotonic()

    def _parts(self) -> list[str]:
        """Returns the parts of the line, most important first; the first has title and share."""
        parts = [f"{self.title + ' ':<12}{self.n / max(self.total, 1):4.0%}", *self.figures[:1]]
        if self.seconds_left:
            parts.append(f"{clock(self.seconds_left)} left")
            if after := seconds_after.get(self.title):
                parts.append(f"{clock(self.seconds_left + after)} in all")
        parts += self.figures[1:]
        if rate := self.rate:
            parts.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s")
        return [*parts, f"{self.n:,} of {self.total:,} images"]


def fitting(parts: list[str], width: int | None) -> list[str]:
    """Returns as many of the first texts as fit in one line of `width`, but at least one."""
    while width is not None and len(parts) > 1 and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return parts


def clock(seconds: float) -> str:
    """Returns a duration such as 3:20 (minutes and seconds), or 1:03:20 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(share: float, width: int) -> str:
    """Returns a bar of blocks, in eighths of a character if the terminal can show them."""
    if width < 1:
        return ""
    blocks = "▏▎▍▌▋▊▉█"
    try:
        blocks.encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        blocks = "#"
    filled = int(min(share, 1) * width * len(blocks))
    whole, part = divmod(filled, len(blocks))
    return (blocks[-1] * whole + (blocks[part - 1] if part else "")).ljust(width)


def _columns() -> int:
    """Returns the width of the terminal, or a default if it is unknown."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _UNKNOWN_COLUMNS
    except (OSError, ValueError, AttributeError):
        return _UNKNOWN_COLUMNS


class FitProgress(keras.callbacks.Callback):
    """Shows one progress bar for all of `fit`, and a line for each epoch.

    Args:
        title: Label of the bar.
        steps: Total number of steps, over all epochs.
        first_step: Steps before this call of `fit`.
        batch_size: Images in a step.
        together: Steps in a call of the training program; the last call may have fewer.
        per_epoch: Steps of an epoch.
        figures: Function from the metrics of an epoch to texts for its line.
    """

    async_safe = True  # the next steps begin before the loss is read

    def __init__(
        self,
        title: str,
        *,
        steps: int,
        batch_size: int,
        first_step: int = 0,
        together: int = 1,
        per_epoch: int | None = None,
        figures: Callable[[dict[str, float]], list[str]] = lambda logs: [],
    ):
        super().__init__()
        self.steps, self.per_epoch, self.figures = steps, per_epoch or steps, figures
        self.batch_size, self.at_once = batch_size, together * batch_size
        self.held_out: list[str] = []
        self.bar = ProgressBar(title, steps * batch_size, initial=first_step * batch_size)
        self.images, self.seconds, self.last = 0, 0.0, None
        self.is_told = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.bar.n // self.batch_size

    @property
    def rate(self) -> float | None:
        """Images per second in training, without compilation and validation; None until known."""
        return self.images / self.seconds if self.seconds else None

    def on_epoch_begin(self, epoch, logs=None):
        """Restarts the clock, unless no step has run: the first call compiles and is not timed."""
        self.last = None if self.last is None else time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Advances the bar and updates the loss."""
        now, images = time.perf_counter(), min(self.at_once, self.bar.total - self.bar.n)
        if self.last is not None:
            self.images, self.seconds = self.images + images, self.seconds + now - self.last
        self.last = now
        self.bar.figures = [f"loss {logs['loss']:.4f}", *self.held_out]
        self.bar.update(images)
        if self.seconds >= _FIRST_SECONDS and not self.is_told:
            self.is_told = True
            self._tell_time()

    def _tell_time(self) -> None:
        """Prints how long the training will take, now that its speed is known."""
        left = self.steps - self.step
        seconds = left * self.batch_size / self.rate
        if seconds > 2 * _FIRST_SECONDS:
            self.bar.say(f"{self.bar.title}: {left:,} steps left, about {clock(seconds)}")

    def on_epoch_end(self, epoch, logs=None):
        """Prints the line of the epoch; the bar shows the validation loss from now on."""
        if "val_loss" in logs:
            self.held_out = [f"held out {logs['val_loss']:.4f}"]
        self.bar.figures = [f"loss {logs['loss']:.4f}", *self.held_out]
        is_log, is_last = self.bar.width is None, self.step >= self.steps
        if is_log and not (self.bar.is_due or is_last):
            return
        number, epochs = -(-self.step // self.per_epoch), -(-self.steps // self.per_epoch)
        line = [f"epoch {number} of {epochs}", f"step {self.step:,} of {self.steps:,}"]
        line += [f"loss {logs['loss']:.4f}", *self.held_out, *self.figures(logs)]
        if not is_log and len("  ".join(line)) > self.bar.width:
            del line[1]
        self.bar.say("  ".join(fitting(line, self.bar.width)))

    def on_train_end(self, logs=None):
        """Closes the bar, silently in a log that already has the line of the last epoch."""
        told = self.bar.width is None and self.step >= self.steps
        self.bar.close(silently=told)
