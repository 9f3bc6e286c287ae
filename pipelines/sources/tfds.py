"""Datasets that are not there yet: TFDS downloads and prepares them, and glyphs are drawn."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions

from vqbeam.configs import DataConfig, VqbeamError, first_line
from vqbeam.pipelines.cli.errors import INTERRUPTED, is_interrupt, user_message
from vqbeam.pipelines.sources import builder_of


def prepare_source(data: DataConfig, beam_args: Sequence[str]) -> None:
    """Has TFDS download and prepare its dataset, where that was not done yet.

    Raises:
        VqbeamError: There is no such dataset, or it cannot be had; the message says what to do.
    """
    if data.source.startswith("folder:"):
        return
    builder = builder_of(data)
    if builder.is_prepared():
        return
    print(_announcement(data, builder), flush=True)
    config = tfds.download.DownloadConfig(
        beam_options=PipelineOptions(list(beam_args)),
        manual_dir=data.manual_dir,
        try_download_gcs=False,
    )
    try:
        with _ended_by_an_interrupt(), _without_words_on_downloads(data):
            builder.download_and_prepare(download_config=config)
    except Exception as error:
        if is_interrupt(error) or user_message(error):
            raise
        raise VqbeamError(
            f"TFDS could not prepare {builder.info.full_name} ({first_line(error)}); where its "
            "host cannot be reached, prepare it elsewhere and give its folder by --data.data-dir"
        ) from error


def _announcement(data: DataConfig, builder) -> str:
    name, place = builder.info.full_name, builder.data_dir
    if data.source == "glyphs":
        count = sum(builder.COUNTS.values())
        return f"drawing the {count:,} letters of {name}, once, into {place}"
    return (
        f"{name} is not in {place} yet: TFDS prepares it there (if its host cannot be reached, "
        "interrupt, and name a prepared copy by --data.data-dir)"
    )


@contextlib.contextmanager
def _ended_by_an_interrupt() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: TFDS waits for its threads, and they for a host."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_):
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _without_words_on_downloads(data: DataConfig):
    """Returns a context in which TFDS does not tell of a download that there is none of."""
    if data.source == "glyphs":
        return contextlib.redirect_stdout(io.StringIO())
    return contextlib.nullcontext()
