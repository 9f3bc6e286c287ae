"""Measures runs a second time, by a classifier of another architecture and seed.

    python benchmarks/second_judge.py RUN [RUN ...]

The Fréchet distance, precision, recall and label agreement of `vqbeam evaluate` depend on the
features of one classifier. A change that pleases this network alone would raise its figures, and
not those of another one. All runs must have the same images and classes. The classifier is trained
on those of the first run, and kept in --work, so that the next call goes on with it.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import keras
from etils import epath
from keras import layers
from side_by_side import table

from vqbeam.configs import override
from vqbeam.pipelines.evaluation import features
from vqbeam.pipelines.evaluation.reference import FIGURES, ReferenceSet, SampleEvaluator
from vqbeam.pipelines.sampling.api import Run
from vqbeam.vqvae.storage.run_folder import RunFolder

SEED = 1234
WIDTHS, BLOCKS, GROUPS = (32, 64, 128), 2, 8
HEADER = ["run", "images", *(title for title, _ in FIGURES.values())]


class JudgedRun(RunFolder):
    """A run whose classifier is kept elsewhere, and has a seed of its own."""

    def __init__(self, root: str, work: str):
        super().__init__(root)
        self.work = work

    @property
    def evaluation(self):
        """The folder of the classifier."""
        return epath.Path(self.work)

    def load_config(self):
        """Returns the run's config with the seed of the classifier."""
        return override(super().load_config(), {"seed": SEED})


def build_classifier(image_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Returns a residual network from uint8 images [B, H, W, C] to logits.

    It has blocks of two convolutions before which groups of channels are normalized ("Identity
    Mappings in Deep Residual Networks", He et al. 2016, https://arxiv.org/abs/1603.05027), and max
    pooling between them; the classifier of `vqbeam evaluate` has neither.
    """

    def convolved(x, width):
        x = layers.Activation("gelu")(layers.GroupNormalization(GROUPS)(x))
        return layers.Conv2D(width, 3, padding="same")(x)

    images = keras.Input(image_shape, dtype="uint8")
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(images)
    x = layers.Conv2D(WIDTHS[0], 3, padding="same")(x)
    for width in WIDTHS:
        x = layers.MaxPooling2D(2, padding="same")(x)
        for _ in range(BLOCKS):
            kept = x if x.shape[-1] == width else layers.Conv2D(width, 1)(x)
            x = kept + convolved(convolved(x, width), width)
    x = layers.Activation("gelu")(layers.GroupNormalization(GROUPS)(x))
    x = layers.GlobalAveragePooling2D(name=features.FEATURES)(x)
    return keras.Model(images, layers.Dense(classes)(x))


def measure(root: str, work: str, num: int) -> list[list[str]]:
    """Returns the rows of a run."""
    run, judged = RunFolder(root), JudgedRun(root, work)
    settings = Run(root).default_settings()
    seed = run.load_config().seed
    reference = ReferenceSet(judged, num, "classifier", seed)
    evaluator = SampleEvaluator(run, reference, settings.batch_size, seed)
    sets = {
        "real": evaluator.real(),
        "reconstructions": evaluator.reconstructions(),
        "samples": reference.compare(evaluator.samples(settings)),
    }
    return [
        [root, name, *(_text(form, found[key]) for key, (_, form) in FIGURES.items())]
        for name, found in sets.items()
    ]


def _text(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)  # a set may be too small


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of finished runs with classes")
    parser.add_argument("--work", default="runs/second-judge", help="folder of the classifier")
    parser.add_argument("--num", type=int, default=10_000, help="images of a set (default 10,000)")
    arguments = parser.parse_args()
    features.build_classifier = build_classifier
    rows = [row for run in arguments.runs for row in measure(run, arguments.work, arguments.num)]
    share = features.classifier_accuracy(JudgedRun(arguments.runs[0], arguments.work))
    print(table(HEADER, rows))
    print(f"the second classifier names the class of {share:.1%} of the held-out images")


if __name__ == "__main__":
    main()
