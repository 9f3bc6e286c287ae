"""The vqbeam side of `gpu.py`.

    python benchmarks/gpu_vqbeam.py stage1|stage2|encode PRESET
    python benchmarks/gpu_vqbeam.py sampling PRESET BATCH

Prints a JSON object for each measurement.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gpu_work as work
import measuring
import numpy as np
from fit_times import fit_seconds

from vqbeam.configs import SamplerSettings
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.training import build_optimizer as build_prior_optimizer
from vqbeam.prior.training import build_prior
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.devices import compiled_encoder, describe_devices, in_batches, peak_flops
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.fitting.program import steps_per_call
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.storage.labels import Labels


def stage1(name):
    """Reports the seconds per step of `fit`, with images on the device."""
    config = work.preset(name)
    settings = config.vqvae
    model = build_model(config, data_variance=1.0)
    model.compile(build_optimizer(settings))
    held = {"image": work.images(config, 8 * settings.batch_size)}
    time_training("stage1", name, model, held, lambda batch: scale_images(batch["image"]), settings)


def stage2(name):
    """Reports the seconds per step of `fit`, with codes on the device."""
    config = work.preset(name)
    model = untrained_prior(config)
    model.compile(build_prior_optimizer(config.prior))
    codes = work.codes(config)
    held = {"codes": codes, "labels": np.arange(len(codes), dtype="int32") % work.LABELS}
    time_training("stage2", name, model, held, lambda batch: batch, config.prior)


def time_training(part, name, model, held, prepare, settings):
    """Reports the seconds per step of a training."""
    steps = work.STEPS.get((part, name), work.USUAL_STEPS)
    seconds = fit_seconds(
        model,
        held,
        prepare,
        batch_size=settings.batch_size,
        steps=steps,
        epochs=1 + work.BLOCKS,
        together=steps_per_call(steps),
    )
    measuring.report(part, settings.dtype, seconds=seconds)


def encode(name):
    """Reports the time from a batch of images on the host to their codes on the host."""
    config = work.preset(name)
    encoder = compiled_encoder(build_model(config, data_variance=1.0))
    batch_size = config.encode.batch_size
    images = work.images(config, batch_size)
    in_batches(encoder, images, batch_size)
    seconds = measuring.seconds(lambda: in_batches(encoder, images, batch_size))
    measuring.report("encode", config.vqvae.dtype, seconds=seconds)


def sampling(name, batch_size):
    """Reports the time to sample a batch of grids, in both precisions."""
    batch_size = int(batch_size)
    sampler = Sampler(untrained_prior(work.preset(name)).with_dtype("float32"), batch_size)
    labels = np.arange(batch_size) % work.LABELS
    for precision in ("exact", "fast"):
        settings = SamplerSettings(precision=precision)
        sampler(labels, 0, settings)
        seconds = measuring.seconds(lambda settings=settings: sampler(labels, 0, settings))
        measuring.report("sampling", precision, seconds=seconds)


def untrained_prior(config):
    """Returns the prior of a preset, for ten classes."""
    return build_prior(config, Labels(tuple(map(str, range(work.LABELS)))))


if __name__ == "__main__":
    part, *arguments = sys.argv[1:]
    measuring.report("device", name=describe_devices(), peak=peak_flops())
    {"stage1": stage1, "stage2": stage2, "encode": encode, "sampling": sampling}[part](*arguments)
