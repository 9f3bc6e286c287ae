"""How far a training is, for whoever watches the job of a Beam runner."""

import keras
from apache_beam.metrics import Metrics


class TrainingMetrics(keras.callbacks.Callback):
    """Counts the steps of a training and tells its loss, after each epoch.

    Beam shows them among the job's metrics, in the namespace `vqbeam`: the counter `STAGE_steps`,
    of what this attempt has trained, and the gauge `STAGE_loss_millionths`, as a gauge takes whole
    numbers alone.

    Args:
        stage: What their names begin with.
    """

    def __init__(self, stage: str):
        super().__init__()
        self.steps = Metrics.counter("vqbeam", f"{stage}_steps")
        self.loss = Metrics.gauge("vqbeam", f"{stage}_loss_millionths")

    def on_epoch_end(self, epoch, logs=None):
        """Tells Beam of the epoch."""
        self.steps.inc(self.params["steps"])
        self.loss.set(round(1e6 * logs["loss"]))
