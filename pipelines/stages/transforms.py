"""The Beam transform of each stage, which takes and returns the path of a run."""

import apache_beam as beam
import keras
from apache_beam.metrics import Metrics

from vqbeam.pipelines.stages.encode import EncodeStage
from vqbeam.pipelines.stages.prepare import PrepareImages

# Resource hints for a Dataflow worker that trains. Other runners do not get them: they cannot
# honour them, and local ones would start a set of processes for each distinct hint.
GPU_HINTS = {"accelerator": "type:nvidia-l4;count:1;install-nvidia-driver", "min_ram": "16GB"}


def transform(stage: str, gpu_hint: bool) -> beam.PTransform:
    """Returns the transform of a stage.

    Args:
        stage: A name from `STAGES`.
        gpu_hint: Whether to request a GPU from the runner if the stage trains.
    """
    hints = GPU_HINTS if gpu_hint else {}
    match stage:
        case "prepare":
            return PrepareImages()
        case "train-vqvae":
            return beam.Map(_train_vqvae).with_resource_hints(**hints)
        case "encode":
            return EncodeStage()
        case "train-prior":
            return beam.Map(_train_prior).with_resource_hints(**hints)
        case "sample":
            return beam.Map(_sample)
    raise ValueError(stage)


def _train_vqvae(run_path: str) -> str:
    from vqbeam.pipelines.report.page import LivePage
    from vqbeam.vqvae.training import train_vqvae

    train_vqvae(run_path, [TrainingMetrics("train_vqvae"), LivePage(run_path, "train-vqvae")])
    return run_path


def _train_prior(run_path: str) -> str:
    from vqbeam.pipelines.report.page import LivePage
    from vqbeam.prior.training import train_prior

    train_prior(run_path, [TrainingMetrics("train_prior"), LivePage(run_path, "train-prior")])
    return run_path


def _sample(run_path: str) -> str:
    from vqbeam.pipelines.sampling.sample import sample_stage

    sample_stage(run_path)
    return run_path


class TrainingMetrics(keras.callbacks.Callback):
    """Reports training steps and loss as Beam metrics, after each epoch.

    Beam shows them among the job's metrics, in the namespace `vqbeam`: the counter `STAGE_steps`
    with the steps of this attempt, and the gauge `STAGE_loss_millionths`, as gauges are integers.

    Args:
        stage: The prefix of the metrics' names.
    """

    def __init__(self, stage: str):
        super().__init__()
        self.steps = Metrics.counter("vqbeam", f"{stage}_steps")
        self.loss = Metrics.gauge("vqbeam", f"{stage}_loss_millionths")
        self.done = 0

    def on_train_batch_begin(self, batch, logs=None):
        """Counts the steps of this epoch in this attempt."""
        self.done = batch + self.model.steps_per_execution

    def on_epoch_end(self, epoch, logs=None):
        """Reports the epoch."""
        self.steps.inc(self.done)
        self.loss.set(round(1e6 * logs["loss"]))
