"""Seeds faults into the product, one at a time, and checks that the tests detect each.

    python tests/mutants.py                    # all faults, one after the other
    python tests/mutants.py --only lock        # those whose promise, name or file matches
    python tests/mutants.py --markdown docs/mutants.md    # all, and the table on that page

Not a test: a run of it takes as long as the selected tests take for each fault. It works on
temporary copies of the repository's tracked files, so the checkout is never edited.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A fault that makes a test hang counts as found.
TIME_LIMIT = 600


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: What goes wrong, in words.
        file: The file that has the fault.
        old: Code that is in the file exactly once.
        new: The code that replaces it.
        tests: Names of tests in `tests`, separated by spaces, that must notice the fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        """The tests as pytest names them."""
        return [f"tests/{test}" for test in self.tests.split()]

    def apply(self, text: str) -> str:
        """Returns the text of the file with the fault; exits if `old` is not in it once."""
        if (count := text.count(self.old)) != 1:
            sys.exit(f"{self.file}: {self.old!r} occurs {count} times, not once ({self.name})")
        return text.replace(self.old, self.new)


class Result(NamedTuple):
    """The result of a fault.

    Attributes:
        mutant: The fault.
        noticed: The test that failed, "time limit", or "" if none did.
        seconds: Duration of the test run.
        output: What pytest printed.
    """

    mutant: Mutant
    noticed: str
    seconds: float
    output: str


def selected(pattern: str) -> dict[str, list[Mutant]]:
    """Returns the faults whose promise, name or file matches a pattern, by promise."""
    search = re.compile(pattern, re.IGNORECASE).search
    found = {
        promise: [m for m in faults if search(f"{promise}\n{m.name}\n{m.file}")]
        for promise, faults in FAULTS.items()
    }
    return {promise: faults for promise, faults in found.items() if faults}


def copy_of_checkout(folder: pathlib.Path) -> pathlib.Path:
    """Returns a new copy of the tracked files, in a folder of its own below `folder`.

    Each fault has a copy of its own: in one that is edited again and again, Python could take
    compiled code of the fault before for that of a file of the same size and second.
    """
    copy = pathlib.Path(tempfile.mkdtemp(dir=folder))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def python(copy: pathlib.Path, *words: str, limit: float | None = None):
    """Returns the finished process of Python, which imports the product from a copy."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )


def pytest(copy: pathlib.Path, nodes: list[str], limit: float | None = None):
    """Returns the finished process of the tests, which end with the first that fails."""
    return python(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *nodes, limit=limit)


def check_without_faults(mutants: list[Mutant], folder: pathlib.Path) -> None:
    """Exits unless the product comes from the copy, and all selected tests pass there."""
    copy = copy_of_checkout(folder)
    code = "import vqbeam.configs, vqbeam.vqvae; print(vqbeam.configs.__file__)"
    imported = python(copy, "-c", code).stdout.strip()
    if not imported.startswith(str(copy)):
        sys.exit(f"vqbeam is imported from {imported}, not from the copy in {copy}")
    nodes = sorted({node for mutant in mutants for node in mutant.nodes})
    start = time.monotonic()
    process = pytest(copy, nodes)
    if process.returncode:
        sys.exit(
            f"{process.stdout}\nwithout a fault, the tests above do not pass"
            " (files that git does not track are left out)"
        )
    print(f"without a fault: {len(nodes)} tests pass, {time.monotonic() - start:.0f} s", flush=True)
    shutil.rmtree(copy)


def seed(mutant: Mutant, folder: pathlib.Path) -> Result:
    """Returns what the tests of a fault say of it."""
    copy = copy_of_checkout(folder)
    path = copy / mutant.file
    path.write_text(mutant.apply(path.read_text()))
    start = time.monotonic()
    try:
        process = pytest(copy, mutant.nodes, limit=TIME_LIMIT)
        # 1 says that a test failed; any other status is none of a test that noticed something.
        failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", process.stdout, re.MULTILINE)
        noticed = failed[1].partition("[")[0] if process.returncode == 1 and failed else ""
        output = process.stdout
    except subprocess.TimeoutExpired:
        noticed, output = "time limit", ""
    shutil.rmtree(copy)
    return Result(mutant, noticed, time.monotonic() - start, output)


def run(mutants: list[Mutant], jobs: int) -> Iterator[Result]:
    """Yields the result of each fault, in order."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = pathlib.Path(name).resolve()
        check_without_faults(mutants, folder)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(lambda mutant: seed(mutant, folder), mutants)


def write_table(path: pathlib.Path, results: list[Result]) -> None:
    """Writes the table of results to a page, in place of the one that it ends with."""
    noticed = {result.mutant: result.noticed for result in results}
    lines = ["| promise | fault | test that notices it |", "|---|---|---|"]
    for promise, faults in FAULTS.items():
        for mutant in (m for m in faults if m in noticed):
            lines.append(f"| {promise} | {mutant.name} | `{noticed[mutant] or 'none'}` |")
    head = path.read_text().partition(lines[0])[0] if path.exists() else ""
    path.write_text(head + "\n".join(lines) + "\n")


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the faults, and run nothing")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="page for the table")
    words = parser.parse_args()
    mutants = [mutant for faults in selected(words.only).values() for mutant in faults]
    for mutant in mutants:
        mutant.apply((ROOT / mutant.file).read_text())
        if words.list:
            print(f"{mutant.name}, {mutant.file}, {mutant.tests}")
    if words.list or not mutants:
        print(f"{len(mutants)} faults")
        return 0
    results = []
    for result in run(mutants, words.jobs):
        results.append(result)
        mutant = result.mutant
        if not result.noticed:
            print("\n".join(result.output.splitlines()[-15:]))
        noticed = result.noticed or "MISSED"
        print(f"{mutant.name}, {mutant.file}, {noticed}, {result.seconds:.0f} s", flush=True)
    if words.markdown:
        write_table(words.markdown, results)
    found = sum(bool(result.noticed) for result in results)
    print(f"{len(results)} faults, {found} found")
    return int(found < len(results))


# By promise, in plain words. Each `old` is code alone, since texts are reworded more often.
FAULTS: dict[str, list[Mutant]] = {
    "The decoder's gradient reaches the encoder": [
        Mutant(
            "the estimator passes no gradient",
            "vqvae/quantizers/estimators.py",
            "z + ops.stop_gradient(quantized - z)",
            "ops.stop_gradient(z + (quantized - z))",
            "test_gradients.py::test_gradient_at_z_is_that_at_the_quantized",
        ),
        Mutant(
            "the estimator passes half of the gradient",
            "vqvae/quantizers/estimators.py",
            "z + ops.stop_gradient(quantized - z)",
            "0.5 * z + ops.stop_gradient(quantized - 0.5 * z)",
            "test_gradients.py::test_straight_through_is_the_identity_to_a_gradient",
        ),
    ],
    "The codebook gets no gradient through the estimator": [
        Mutant(
            "the estimator has no stop-gradient",
            "vqvae/quantizers/estimators.py",
            "z + ops.stop_gradient(quantized - z)",
            "z + (quantized - z)",
            "test_gradients.py::"
            "test_reconstruction_reaches_encoder_and_decoder_and_not_the_codebook",
        ),
    ],
    "The codebook loss moves the codebook alone": [
        Mutant(
            "the codebook loss has no stop-gradient",
            "vqvae/quantizers/vector.py",
            "ops.stop_gradient(z) - quantized",
            "z - quantized",
            "test_gradients.py::test_codebook_loss_reaches_only_the_codebook",
        ),
    ],
    "The commitment loss moves the encoder alone": [
        Mutant(
            "the commitment loss has no stop-gradient",
            "vqvae/quantizers/vector.py",
            "z - ops.stop_gradient(quantized)",
            "z - quantized",
            "test_gradients.py::test_commitment_reaches_only_the_encoder",
        ),
    ],
    "Each loss stops the gradient on its own side": [
        Mutant(
            "the codebook loss stops the gradient of the codebook",
            "vqvae/quantizers/vector.py",
            "ops.stop_gradient(z) - quantized",
            "z - ops.stop_gradient(quantized)",
            "test_gradients.py::test_codebook_gradient_in_closed_form",
        ),
        Mutant(
            "the commitment loss stops the gradient of the encoder",
            "vqvae/quantizers/vector.py",
            "z - ops.stop_gradient(quantized)",
            "ops.stop_gradient(z) - quantized",
            "test_gradients.py::test_commitment_gradient_in_closed_form",
        ),
    ],
    "β weighs the commitment loss alone": [
        Mutant(
            "the commitment loss has no weight",
            "vqvae/quantizers/vector.py",
            'losses["commitment"] = self.commitment * error',
            'losses["commitment"] = error',
            "test_gradients.py::test_whole_loss_weighs_the_parts",
        ),
        Mutant(
            "β weighs the codebook loss as well",
            "vqvae/quantizers/vector.py",
            'losses["codebook"] = ops.mean(',
            'losses["codebook"] = self.commitment * ops.mean(',
            "test_gradients.py::test_codebook_gradient_in_closed_form",
        ),
        Mutant(
            "the reconstruction loss is not divided by the variance",
            "vqvae/model.py",
            "ops.mean(error) / self.data_variance",
            "ops.mean(error)",
            "test_gradients.py::test_whole_loss_weighs_the_parts",
        ),
    ],
    "Moving averages give the codebook no gradient": [
        Mutant(
            "the codebook is trainable with moving averages too",
            "vqvae/quantizers/vector.py",
            'trainable=self.update == "gradient"',
            "trainable=True",
            "test_gradients.py::test_averages_give_the_codebook_no_gradient "
            "test_vector_quantizer.py::test_learning_by_averages_has_no_trainable_weight",
        ),
    ],
    "The other estimators follow their papers": [
        Mutant(
            "the rotation adds the wrong direction",
            "vqvae/quantizers/estimators.py",
            "2 * _dot(z, u) * q",
            "2 * _dot(z, u) * u",
            "test_estimators.py::test_rotation_turns_the_gradient",
        ),
        Mutant(
            "diveq keeps the gradient along the error",
            "vqvae/quantizers/estimators.py",
            "across = z - _dot(z, direction) * direction",
            "across = z",
            "test_estimators.py::test_diveq_drops_the_gradient_along_the_error",
        ),
    ],
    "The codebook follows the moving averages": [
        Mutant(
            "the sums of a batch have the wrong weight",
            "vqvae/quantizers/vector.py",
            "(1.0 - self.decay) * sums",
            "sums",
            "test_vector_quantizer.py::test_moving_averages_over_several_steps",
        ),
        Mutant(
            "decay and its complement are swapped",
            "vqvae/quantizers/vector.py",
            "self.decay * self.ema_counts + (1.0 - self.decay) * counts",
            "(1.0 - self.decay) * self.ema_counts + self.decay * counts",
            "test_vector_quantizer.py::test_moving_averages_over_several_steps",
        ),
        Mutant(
            "the counts are not smoothed",
            "vqvae/quantizers/vector.py",
            "(ema_counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total",
            "ema_counts",
            "test_vector_quantizer.py::test_moving_averages_over_several_steps",
        ),
        Mutant(
            "the smoothing ignores the number of codes",
            "vqvae/quantizers/vector.py",
            "(total + self.num_codes * self.epsilon)",
            "(total + self.epsilon)",
            "test_vector_quantizer.py::test_moving_averages_over_several_steps",
        ),
        Mutant(
            "codes that nothing chooses move too",
            "vqvae/quantizers/vector.py",
            "chosen = counts[:, None] > 0",
            "chosen = counts[:, None] >= 0",
            "test_vector_quantizer.py::test_codes_that_nothing_chooses_hold_their_place",
        ),
    ],
    "The usage of a code decays": [
        Mutant(
            "usage only grows",
            "vqvae/quantizers/vector.py",
            "self.usage_decay * self.usage + counts",
            "self.usage + counts",
            "test_vector_quantizer.py::test_usage_fades_by_a_hundredth_a_step",
        ),
        Mutant(
            "usage decays ten times as fast",
            "vqvae/quantizers/vector.py",
            "usage_decay = 0.99",
            "usage_decay = 0.9",
            "test_vector_quantizer.py::test_usage_fades_by_a_hundredth_a_step",
        ),
    ],
    "Dead codes are restarted at vectors of the batch": [
        Mutant(
            "the threshold does not scale with the mean usage",
            "vqvae/quantizers/vector.py",
            "self.restart_below * mean_usage",
            "self.restart_below",
            "test_vector_quantizer.py::test_restarts_measure_neglect_against_the_mean_usage",
        ),
        Mutant(
            "codes in use are restarted",
            "vqvae/quantizers/vector.py",
            "self.usage < self.restart_below",
            "self.usage > self.restart_below",
            "test_vector_quantizer.py::"
            "test_restarts_move_neglected_codes_onto_vectors_of_the_batch",
        ),
        Mutant(
            "the averages of a restarted code stay behind",
            "vqvae/quantizers/vector.py",
            "rows, drawn * mean_count",
            "rows, drawn",
            "test_vector_quantizer.py::test_restarts_move_averages_along",
        ),
    ],
    "The codebook starts at data or at cluster centres": [
        Mutant(
            "k-means makes no iteration",
            "vqvae/quantizers/nearest.py",
            '_ITERATIONS if method == "kmeans" else 0',
            "0",
            "test_clusters.py::test_clusters_fit_better_than_data",
        ),
        Mutant(
            "an empty cluster stays at zero",
            "vqvae/quantizers/nearest.py",
            "centres, _draw(vectors, num_codes, numbers)",
            "centres, 0.0",
            "test_clusters.py::test_empty_clusters_begin_again_at_a_vector",
        ),
        Mutant(
            "a vector is taken twice",
            "vqvae/quantizers/nearest.py",
            "replace=size < num_codes",
            "replace=True",
            "test_clusters.py::test_data_are_vectors_each_taken_once",
        ),
    ],
    "The nearest code is found": [
        Mutant(
            "the farthest code is found",
            "vqvae/quantizers/nearest.py",
            "ops.pad(codebook, ((0, added), (0, 0))),\n            ops.pad(-0.5 * offsets,",
            "ops.pad(-codebook, ((0, added), (0, 0))),\n            ops.pad(0.5 * offsets,",
            "test_nearest.py::test_matches_float64",
        ),
        Mutant(
            "the lengths of the codes are left out",
            "vqvae/quantizers/nearest.py",
            "-0.5 * offsets",
            "0.0 * offsets",
            "test_nearest.py::test_matches_float64",
        ),
        Mutant(
            "of equal codes the last is taken",
            "vqvae/quantizers/nearest.py",
            "best > found[0]",
            "best >= found[0]",
            "test_nearest.py::test_of_equal_codes_the_first_in_any_blocks",
        ),
        Mutant(
            "codes of later blocks have the wrong number",
            "vqvae/quantizers/nearest.py",
            "index + i * width",
            "index + i",
            "test_nearest.py::test_more_codes_than_a_block",
        ),
    ],
    "vector: codes stand for the vectors that they were chosen for": [
        Mutant(
            "the rows of restarted codes are subtracted",
            "vqvae/quantizers/vector.py",
            "vectors = vectors + ops.take(self.moves, codes, axis=0)",
            "vectors = vectors - ops.take(self.moves, codes, axis=0)",
            "test_vector_quantizer.py::test_restarts_of_a_trainable_codebook_are_added_to_it",
        ),
    ],
    "simvq: the codes are the fixed vectors times the learned matrix": [
        Mutant(
            "the matrix is transposed on decoding",
            "vqvae/quantizers/simvq.py",
            "self._mapped(fixed)",
            "ops.matmul(fixed, ops.transpose(self.projection))",
            "test_simvq.py::test_values_with_another_map_than_the_identity",
        ),
    ],
    "predictive: each turn is guessed from the turns before it": [
        Mutant(
            "the neighbours are those of the cell above",
            "vqvae/quantizers/predictive.py",
            "rows[places] + 1 + dy",
            "rows[places] + dy",
            "test_predictive.py::test_a_training_step_predicts_by_the_codebook_before_it",
        ),
        Mutant(
            "cells are put back in the wrong order",
            "vqvae/quantizers/predictive.py",
            "np.argsort(order), axis=1",
            "order, axis=1",
            "test_predictive.py::test_without_predictions_it_is_a_vector_quantizer",
        ),
    ],
    "residual: each level quantizes what the levels before it leave": [
        Mutant(
            "the chosen vector is added to the residual",
            "vqvae/quantizers/residual.py",
            "residual - ops.stop_gradient(chosen)",
            "residual + ops.stop_gradient(chosen)",
            "test_residual.py::test_more_levels_leave_less",
        ),
        Mutant(
            "the levels are decoded in reverse",
            "vqvae/quantizers/residual.py",
            "ops.unstack(codes, self.levels, axis=-1)",
            "ops.unstack(codes, self.levels, axis=-1)[::-1]",
            "test_residual.py::test_all_that_holds_for_quantizers",
        ),
    ],
    "fsq: a code is the digits of its channels": [
        Mutant(
            "the places of the digits are those of other sizes",
            "vqvae/quantizers/fsq.py",
            "[1, *sizes[:-1]]",
            "[1, *sizes[1:]]",
            "test_fsq.py::test_every_code_stands_for_a_point_of_its_own_that_is_quantized_to_it",
        ),
    ],
    "lfq: a code is the signs of its channels": [
        Mutant(
            "the bits have the wrong places",
            "vqvae/quantizers/lfq.py",
            "2 ** np.arange(num_bits",
            "2 * np.arange(num_bits",
            "test_lfq.py::test_every_code_is_a_corner_of_its_own",
        ),
        Mutant(
            "the mean entropy is punished",
            "vqvae/quantizers/lfq.py",
            "of_each - of_mean",
            "of_each + of_mean",
            "test_lfq.py::test_entropy_is_exact_up_to_512_codes",
        ),
    ],
    "Codes have one order in a sequence": [
        Mutant(
            "the codes of a position lie apart",
            "vqvae/layout.py",
            "np.repeat(centres, self.depth)",
            "np.tile(centres.ravel(), self.depth)",
            "test_layout.py::test_the_codes_of_a_position_lie_side_by_side",
        ),
        Mutant(
            "the levels of a position follow one another grid by grid",
            "vqvae/layout.py",
            'np.tile(np.arange(self.depth, dtype="int32"), self.length // self.depth)',
            'np.repeat(np.arange(self.depth, dtype="int32"), self.length // self.depth)',
            "test_layout.py::test_the_codes_of_a_position_lie_side_by_side",
        ),
        Mutant(
            "the fine grid comes before the coarse one",
            "vqvae/layout.py",
            "((rows // 2, columns // 2), config.grid)",
            "(config.grid, (rows // 2, columns // 2))",
            "test_layout.py::test_layout_of_a_config",
        ),
    ],
    "The filters keep the codes that they promise": [
        Mutant(
            "top-k keeps a code too many",
            "prior/filters.py",
            "ops.ones_like(logits), count",
            "ops.ones_like(logits), count + 1",
            "test_drawing.py::test_draws_against_numpy",
        ),
        Mutant(
            "top-p forgets that top-k has removed codes",
            "prior/filters.py",
            "weights / ops.sum(weights, axis=-1, keepdims=True)",
            "ops.softmax(logits)",
            "test_drawing.py::test_draws_against_numpy",
        ),
        Mutant(
            "min-p is no share of the most likely code",
            "prior/filters.py",
            "ops.where(weights >= p, weights, 0.0)",
            "ops.where(weights / ops.sum(weights, axis=-1, keepdims=True) >= p, weights, 0.0)",
            "test_drawing.py::test_draws_against_numpy",
        ),
        Mutant(
            "the temperature multiplies the logits",
            "prior/filters.py",
            "logits / ops.where(temperature > 0",
            "logits * ops.where(temperature > 0",
            "test_drawing.py::test_draws_against_numpy",
        ),
        Mutant(
            "of tied codes all are kept",
            "prior/filters.py",
            "ops.cumsum(tied, axis=-1) - tied < missing",
            "missing < np.inf",
            "test_drawing.py::test_draws_against_numpy",
        ),
    ],
    "Guidance is u + s (c − u)": [
        Mutant(
            "guidance starts from the logits with the label",
            "prior/sampler.py",
            "else logits[-1] + scale *",
            "else with_class + scale *",
            "test_sampler.py::test_codes_follow_their_uniform_numbers",
        ),
        Mutant(
            "guidance leads away from class 0",
            "prior/sampler.py",
            "ops.full_like(labels, model.null_label)",
            "ops.full_like(labels, 0)",
            "test_sampler.py::test_guidance_zero_is_the_null_class",
        ),
        Mutant(
            "the cosine ramp ignores its exponent",
            "prior/filters.py",
            "way**settings.guidance_power",
            "way",
            "test_guidance.py::test_scales",
        ),
        Mutant(
            "the linear schedule falls",
            "prior/filters.py",
            "np.linspace(1, 0, length)[::-1]",
            "np.linspace(1, 0, length)",
            "test_guidance.py::test_scales",
        ),
        Mutant(
            "the interval leaves out its start",
            "prior/filters.py",
            "(settings.guidance_start <= place)",
            "(settings.guidance_start < place)",
            "test_guidance.py::test_scales",
        ),
    ],
    "A share of the labels is dropped in training": [
        Mutant(
            "all labels but that share are dropped",
            "prior/training.py",
            "< settings.label_dropout",
            "> settings.label_dropout",
            "test_prior_training.py::test_a_share_of_the_labels_is_dropped",
        ),
        Mutant(
            "a hundred steps later, the same labels are dropped",
            "vqvae/fitting/data.py",
            "tf.stack([np.int64(seed), index])",
            "tf.stack([np.int64(seed), np.int64(0)])",
            "test_data.py::test_each_step_has_random_numbers_of_its_own",
        ),
    ],
    "The cached sampler computes what the whole sequence does": [
        Mutant(
            "a step does not see its own position",
            "prior/block.py",
            "ops.arange(key_cache.shape[2]) <= position",
            "ops.arange(key_cache.shape[2]) < position",
            "test_transformer.py::test_steps_give_the_logits_of_the_whole_sequence",
        ),
        Mutant(
            "a step has the embedding of the next position",
            "prior/transformer.py",
            "start_index=position",
            "start_index=position + 1",
            "test_transformer.py::test_steps_give_the_logits_of_the_whole_sequence",
        ),
        Mutant(
            "a code is stored one position late",
            "prior/sampler.py",
            "ops.slice_update(codes, (0, position), code)",
            "ops.slice_update(codes, (0, position + 1), code)",
            "test_sampler.py::test_greedy_is_the_argmax_of_the_whole_sequence",
        ),
        Mutant(
            "codes to keep are replaced, and the others kept",
            "prior/sampler.py",
            'ops.where(here("keep"), here("known"), code)',
            'ops.where(here("keep"), code, here("known"))',
            "test_sampler.py::test_kept_codes_stay_and_the_others_follow_those_before_them",
        ),
    ],
    "Fast precision rounds to bfloat16, but no logits": [
        Mutant(
            "fast rounds nothing",
            "prior/sampler.py",
            'model.with_dtype("bfloat16")',
            'model.with_dtype("float32")',
            "test_sampler.py::test_fast_is_bfloat16_but_for_the_logits",
        ),
        Mutant(
            "fast rounds the logits as well",
            "prior/transformer.py",
            '"float32" if policy.name == "bfloat16" else policy',
            "policy",
            "test_sampler.py::test_fast_is_bfloat16_but_for_the_logits",
        ),
    ],
    "The options of a block do what they say": [
        Mutant(
            "queries are normalized, keys are not",
            "prior/block.py",
            "self.qk_norms[0](query), self.qk_norms[1](key)",
            "self.qk_norms[0](query), key",
            "test_transformer.py::test_block_against_numpy",
        ),
        Mutant(
            "branches never start at zero",
            "prior/block.py",
            '"zeros" if zero_init else "glorot_uniform"',
            '"glorot_uniform"',
            "test_transformer.py::test_a_block_that_starts_at_zero_returns_its_input",
        ),
    ],
    "A code depends on those before it alone": [
        Mutant(
            "attention sees the code that is predicted",
            "prior/block.py",
            "np.tri(len(self.cos), dtype=bool)",
            "np.tri(len(self.cos), k=1, dtype=bool)",
            "test_transformer.py::test_a_code_changes_only_later_logits",
        ),
    ],
    "Likelihoods are sums in nats, and bits per dimension": [
        Mutant(
            "nats become decimal digits",
            "prior/training.py",
            "layout.length / math.log(2)",
            "layout.length / math.log(10)",
            "test_prior_training.py::test_measures_in_numpy",
        ),
        Mutant(
            "the likelihood is a mean over positions",
            "prior/sampler.py",
            "-ops.sum(weights * losses, axis=-1)",
            "-ops.mean(weights * losses, axis=-1)",
            "test_scoring.py::test_in_numpy_from_the_logits",
        ),
    ],
    "A resumed training is an unbroken one": [
        Mutant(
            "a step is trained twice",
            "vqvae/fitting/checkpoints.py",
            "return step\n            except",
            "return step - 1\n            except",
            "test_fitting.py::test_begins_where_the_checkpoint_ends",
        ),
        Mutant(
            "the state of the optimizer is not restored",
            "vqvae/fitting/checkpoints.py",
            "model.optimizer.build(model.trainable_variables)",
            "pass",
            "test_fitting.py::test_resumed_is_unbroken_bit_for_bit",
        ),
        Mutant(
            "the data begin again",
            "vqvae/fitting/fit.py",
            "batches(step)",
            "batches(0)",
            "test_fitting.py::test_begins_where_the_checkpoint_ends",
        ),
        Mutant(
            "a pass that was broken off begins again",
            "vqvae/storage/records.py",
            ".skip(offset)",
            ".skip(0)",
            "test_records.py::test_begins_at_any_step",
        ),
        Mutant(
            "layers draw the same numbers as one another",
            "vqvae/fitting/fit.py",
            "[seed, index]",
            "[seed]",
            "test_fitting.py::test_random_layers_begin_with_numbers_of_their_own",
        ),
        Mutant(
            "the states of random generators are not restored",
            "vqvae/fitting/checkpoints.py",
            'state.assign(rest[f"random_states/{index}"][()])',
            "pass",
            "test_fitting.py::test_resumed_within_an_epoch_is_unbroken_bit_for_bit",
        ),
        Mutant(
            "the metrics of a broken epoch begin again",
            "vqvae/fitting/checkpoints.py",
            "variable.assign(value)",
            "pass",
            "test_fitting.py::test_resumed_within_an_epoch_is_unbroken_bit_for_bit",
        ),
        Mutant(
            "the rest of a broken epoch is as long as a whole one",
            "vqvae/fitting/fit.py",
            "self.step + batch +",
            "batch +",
            "test_fitting.py::test_resumed_within_an_epoch_is_unbroken_bit_for_bit",
        ),
        Mutant(
            "training ends with the rest of a broken epoch",
            "vqvae/fitting/fit.py",
            "self.schedule.epoch_end(self.step), False",
            "self.schedule.epoch_end(self.step), True",
            "test_fitting.py::test_resumed_within_an_epoch_is_unbroken_bit_for_bit",
        ),
        Mutant(
            "the last epoch is as long as the others",
            "vqvae/fitting/fit.py",
            "min(self.steps, (step // self.epoch_steps + 1) * self.epoch_steps)",
            "(step // self.epoch_steps + 1) * self.epoch_steps",
            "test_fitting.py::test_the_last_epoch_may_be_shorter",
        ),
        Mutant(
            "the last call runs as many steps as the others",
            "vqvae/fitting/program.py",
            "count = min(steps, self.left)",
            "count = steps",
            "test_fitting.py::test_the_last_epoch_may_be_shorter",
        ),
        Mutant(
            "the clock saves at each step",
            "vqvae/fitting/checkpoints.py",
            "time.monotonic() >= self._due",
            "True",
            "test_fitting.py::test_the_clock_decides_when_to_save",
        ),
        Mutant(
            "an interrupt saves nothing",
            "vqvae/fitting/checkpoints.py",
            "self.signals.waits = True",
            "pass",
            "test_fitting.py::test_an_interrupt_saves_the_step_and_is_resumed_bit_for_bit",
        ),
        Mutant(
            "a second interrupt waits as well",
            "vqvae/fitting/checkpoints.py",
            "        self._restore()\n        self.received = number",
            "        self.received = number",
            "test_fitting.py::test_an_interrupt_ends_at_once",
        ),
        Mutant(
            "the fingerprint has the length of an epoch",
            "vqvae/storage/run_folder.py",
            'settings.pop("steps_per_epoch", None)',
            "pass",
            "test_run_folder.py::"
            "test_the_length_of_an_epoch_may_change_where_the_result_does_not_depend_on_it",
        ),
        Mutant(
            "each pass over held data has the same order",
            "vqvae/fitting/data.py",
            "passes[:, None]], axis=1",
            "0 * passes[:, None]], axis=1",
            "test_data.py::test_each_pass_has_every_example_once_in_an_order_of_its_own",
        ),
        Mutant(
            "a training that goes on begins with the first of a hundred steps",
            "vqvae/fitting/data.py",
            ".skip(before)",
            ".skip(0)",
            "test_data.py::test_begins_at_any_step",
        ),
        Mutant(
            "the steps of a call train on the same batch",
            "vqvae/fitting/program.py",
            "one(_part(batches, index, steps))",
            "one(_part(batches, 0, steps))",
            "test_program.py::test_steps_together_train_as_one_by_one",
        ),
        Mutant(
            "each pass over the data has the same order",
            "vqvae/storage/records.py",
            "seed=seed + index",
            "seed=seed",
            "test_records.py::test_each_pass_holds_each_example_once_in_another_order",
        ),
    ],
    "A training ends with its last step": [
        Mutant(
            "TensorFlow tunes its input pipeline, which may take a minute to free",
            "vqvae/fitting/data.py",
            "found.batch(steps, drop_remainder=True).with_options(UNTUNED)",
            "found.batch(steps, drop_remainder=True)",
            "test_data.py::test_no_training_waits_for_tuning_when_it_ends",
        ),
    ],
    "The result is the average of the weights": [
        Mutant(
            "the decay is not warmed up",
            "vqvae/fitting/optimizers.py",
            "ops.minimum(self.ema_momentum, steps / (steps + 9.0))",
            "self.ema_momentum",
            "test_optimizers.py::test_the_average_of_the_weights_in_numpy",
        ),
        Mutant(
            "the average and the weights are swapped",
            "vqvae/fitting/optimizers.py",
            "kept * average + (1 - kept) *",
            "(1 - kept) * average + kept *",
            "test_optimizers.py::test_the_average_of_the_weights_in_numpy",
        ),
        Mutant(
            "validation measures the weights themselves",
            "vqvae/fitting/fit.py",
            "*([AveragedWeights()] if optimizer.use_ema else [])",
            "*[]",
            "test_fitting.py::test_validation_measures_the_average_and_leaves_the_weights",
        ),
    ],
    "Muon moves the matrices of the prior's blocks, AdamW the rest": [
        Mutant(
            "AdamW has the full learning rate",
            "prior/training.py",
            "adam_lr_ratio=0.5",
            "adam_lr_ratio=1.0",
            "test_optimizers.py::test_muon_leaves_the_rest_of_a_prior_to_adamw",
        ),
        Mutant(
            "only matrices decay",
            "prior/training.py",
            '"adam_weight_decay": settings.weight_decay',
            '"adam_weight_decay": 0.0',
            "test_optimizers.py::test_muon_leaves_the_rest_of_a_prior_to_adamw",
        ),
    ],
    "Files are whole or absent": [
        Mutant(
            "a file is written under its own name",
            "vqvae/storage/files.py",
            "temporary.write_bytes(data)\n        temporary.replace(path)",
            "path.write_bytes(data)",
            "test_files.py::test_files_are_written_whole_or_not_at_all",
        ),
        Mutant(
            "a shard is written under its own name",
            "vqvae/storage/records.py",
            'temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"',
            "temporary = path",
            "test_records.py::test_write_shard_leaves_nothing_of_what_failed",
        ),
        Mutant(
            "a shard that is incomplete is taken over",
            "pipelines/stages/shards.py",
            "earlier and size(self._path) == earlier.bytes and",
            "earlier and",
            "test_shards.py::test_a_report_that_does_not_fit_is_ignored",
        ),
    ],
    "Records have one format": [
        Mutant(
            "the key has another name",
            "vqvae/storage/records.py",
            '"key": tfds.features.Text()',
            '"name": tfds.features.Text()',
            "test_records.py::test_images_round_trip",
        ),
        Mutant(
            "many codes are stored in 16 bits",
            "vqvae/storage/records.py",
            "num_codes <= 2**16",
            "num_codes <= 2**17",
            "test_records.py::test_codes_round_trip",
        ),
        Mutant(
            "the version of code records differs",
            "vqvae/storage/records.py",
            'CODES_VERSION = "1.0.0"',
            'CODES_VERSION = "1.0.1"',
            "test_records.py::test_metadata",
        ),
        Mutant(
            "shards are counted from one",
            "vqvae/storage/records.py",
            "{self.index:0{width}d}-of",
            "{self.index + 1:0{width}d}-of",
            "test_records.py::test_shard_name_is_the_one_that_tfds_looks_for",
        ),
    ],
    "A manifest vouches for its stage": [
        Mutant(
            "a manifest that was changed is trusted",
            "vqvae/storage/run_folder.py",
            'manifest.get("sha256") != _hash_of(manifest) or ',
            "",
            "test_run_folder.py::test_a_manifest_changed_by_hand",
        ),
        Mutant(
            "a stage of older inputs counts as done",
            "vqvae/storage/run_folder.py",
            'manifest is not None and manifest["inputs"] == self._input_hashes(stage)',
            "manifest is not None",
            "test_run_folder.py::test_what_read_an_older_result_is_not_done",
        ),
        Mutant(
            "the size of a result is not looked at",
            "vqvae/storage/run_folder.py",
            "if found != whole:",
            "if found is None:",
            "test_run_folder.py::test_a_damaged_output_is_named",
        ),
        Mutant(
            "a dataset that lacks a file counts as done",
            "vqvae/storage/run_folder.py",
            "fits = False",
            "fits = True",
            "test_run_folder.py::test_a_dataset_that_lacks_a_file_is_not_done",
        ),
    ],
    "Folders and words name the same classes": [
        Mutant(
            "classes are counted from one",
            "pipelines/sources/folder.py",
            "for label, name in enumerate(names)",
            "for label, name in enumerate(names, 1)",
            "test_folder.py::test_subfolders_are_classes",
        ),
        Mutant(
            "a number past the last class is a label",
            "vqvae/storage/labels.py",
            "int(label) < len(names)",
            "int(label) <= len(names)",
            "test_labels.py::test_unknown_label",
        ),
        Mutant(
            "a name in another case goes first",
            "vqvae/storage/labels.py",
            "if label in names:\n        return names.index(label)\n    folded",
            "folded",
            "test_labels.py::test_a_name_goes_before_its_like_in_another_case",
        ),
        Mutant(
            "attributes joined by commas are one name",
            "vqvae/storage/labels.py",
            'text.split(",")',
            "[text]",
            "test_labels.py::test_attributes_of_an_image_are_joined_by_commas",
        ),
        Mutant(
            "labels begin again with each shard",
            "vqvae/storage/labels.py",
            "(first + np.arange(num))",
            "np.arange(num)",
            "test_labels.py",
        ),
    ],
    "The split of a folder follows from the names of its files": [
        Mutant(
            "files are listed by name",
            "pipelines/sources/listing.py",
            'np.argsort(hashes, kind="stable")',
            "np.arange(len(hashes))",
            "test_folder.py::test_any_prefix_is_a_fair_mixture",
        ),
        Mutant(
            "training and validation are swapped",
            "pipelines/sources/listing.py",
            "hashes < validation_share",
            "hashes >= validation_share",
            "test_folder.py::test_splits_have_their_shares_and_share_nothing",
        ),
        Mutant(
            "another hash divides the files",
            "pipelines/sources/listing.py",
            "digest_size=6",
            "digest_size=8",
            "test_folder.py::test_split_and_order_never_change",
        ),
        Mutant(
            "a class called train is a split",
            "pipelines/sources/folder.py",
            "or len(train + held_out) < len(tops)",
            "",
            "test_folder.py::test_other_folders_are_classes_whatever_their_names",
        ),
    ],
    "Files of many images are read row by row": [
        Mutant(
            "rows are counted anew in each row group",
            "pipelines/sources/files/parquet.py",
            "first += count",
            "first = 0",
            "test_image_files.py::test_the_records_are_those_of_a_folder",
        ),
        Mutant(
            "an array is read from its start",
            "pipelines/sources/files/arrays.py",
            "first + row * size",
            "first + rows.index(row) * size",
            "test_image_files.py::test_the_records_are_those_of_a_folder",
        ),
        Mutant(
            "the name of a folder goes before that of the file",
            "pipelines/sources/listing.py",
            'reversed(file.split("/"))',
            'file.split("/")',
            "test_image_files.py::test_names_of_splits",
        ),
        Mutant(
            "a damaged header ends a tar file",
            "pipelines/sources/files/webdataset.py",
            'if buf.strip(b"\\0"):',
            "if not buf:",
            "test_image_files.py::test_a_file_damaged_in_the_middle",
        ),
        Mutant(
            "the first images are the sample",
            "pipelines/sources/files/base.py",
            "np.sort(positions[: self.data.max_images])",
            "np.sort(positions)[: self.data.max_images]",
            "test_image_files.py::test_a_limit_takes_a_fair_sample",
        ),
    ],
    "Images that are decoded side by side stay in order": [
        Mutant(
            "the last one begun comes first",
            "pipelines/sources/source.py",
            "if len(coming) > threads:\n                    yield coming.popleft().result()",
            "if len(coming) > threads:\n                    yield coming.pop().result()",
            "test_sources.py::test_work_in_order_takes_few_items_ahead",
        ),
        Mutant(
            "all images are taken at once",
            "pipelines/sources/source.py",
            "if len(coming) > threads:",
            "if len(coming) > 1000 * threads:",
            "test_sources.py::test_work_in_order_takes_few_items_ahead",
        ),
    ],
    "Images that cannot be decoded are counted": [
        Mutant(
            "no failure is counted",
            "pipelines/stages/prepare.py",
            "failed=len(failures)",
            "failed=0",
            "test_prepare.py::test_counts_and_dead_letters",
        ),
        Mutant(
            "any number of failures is allowed",
            "pipelines/stages/prepare.py",
            "len(failures) > data.max_failed * total",
            "len(failures) > total",
            "test_prepare.py::test_too_many_failures_end_the_stage_until_they_are_mended",
        ),
        Mutant(
            "a file may have any size",
            "vqvae/storage/files.py",
            "os.stat(path).st_size > MOST_BYTES",
            "os.stat(path).st_size < 0",
            "test_folder.py::test_only_regular_files_of_a_sane_size_are_read",
        ),
        Mutant(
            "a held-out copy of a training image stays",
            "pipelines/sources/folder.py",
            "image[0] not in copies",
            "image[0]",
            "test_folder.py::test_copies_are_kept_on_the_side_of_training",
        ),
    ],
    "Images are decoded as people see them": [
        Mutant(
            "images are resized without a filter",
            "pipelines/sources/images.py",
            "ImageOps.fit(image, size, Image.Resampling.LANCZOS)",
            "ImageOps.fit(image, size, Image.Resampling.NEAREST)",
            "test_images.py::test_downscaling_is_antialiased",
        ),
        Mutant(
            "the crop is that of the corner",
            "pipelines/sources/images.py",
            "ImageOps.fit(image, size, Image.Resampling.LANCZOS)",
            "ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=(0, 0))",
            "test_images.py::test_crop_keeps_the_centre",
        ),
        Mutant(
            "what is transparent becomes black",
            "pipelines/sources/images.py",
            'Image.new("RGB", image.size, background)',
            'Image.new("RGB", image.size, "black")',
            "test_images.py::test_alpha_is_composited_on_white",
        ),
        Mutant(
            "the orientation in EXIF is ignored",
            "pipelines/sources/images.py",
            "ImageOps.exif_transpose(image, in_place=True)",
            "pass",
            "test_images.py::test_exif_orientation",
        ),
        Mutant(
            "16-bit gray is clipped",
            "pipelines/sources/images.py",
            "_scale_gray(np.asarray(image), top=65535)",
            'image.convert("L")',
            "test_images.py::test_16_bit_gray_is_scaled_not_clipped",
        ),
        Mutant(
            "profiles of colours are ignored",
            "pipelines/sources/images.py",
            'embedded = image.info.get("icc_profile")',
            "embedded = None",
            "test_images.py::test_colours_of_a_profile_become_those_of_srgb",
        ),
        Mutant(
            "a broken profile of colours is not told",
            "pipelines/stages/prepare.py",
            "for reason in said]",
            "for reason in ()]",
            "test_prepare.py::test_colours_taken_as_they_are_are_listed",
        ),
    ],
    "Augmentation mirrors and shifts, by seed and step": [
        Mutant(
            "images are mirrored about another axis",
            "vqvae/augmentation.py",
            "width - 1 - columns, columns",
            "width - 2 - columns, columns",
            "test_augmentation.py::test_flip_mirrors_about_half",
        ),
        Mutant(
            "both sides are shifted alike",
            "vqvae/augmentation.py",
            "columns + shifts[:, 1:]",
            "columns + shifts[:, :1]",
            "test_augmentation.py::test_crop_shifts_by_up_to_an_eighth",
        ),
        Mutant(
            "images are shifted twice as far",
            "vqvae/augmentation.py",
            "_SHIFT = 1 / 8",
            "_SHIFT = 1 / 4",
            "test_augmentation.py::test_crop_shifts_by_up_to_an_eighth",
        ),
        Mutant(
            "a mirrored variant is no mirror image",
            "vqvae/augmentation.py",
            "crop[:, :, ::-1]",
            "crop[:, ::-1]",
            "test_variants.py",
        ),
    ],
    "Distances between sets of images are those of the papers": [
        Mutant(
            "the overlap counts once",
            "pipelines/evaluation/distances.py",
            "- 2 * overlap",
            "- overlap",
            "test_frechet.py::test_diagonal_covariances_have_a_closed_form",
        ),
        Mutant(
            "the covariance is biased",
            "pipelines/evaluation/distances.py",
            "scatter / (self.count - 1)",
            "scatter / self.count",
            "test_frechet.py::test_moments_are_those_of_numpy",
        ),
        Mutant(
            "an image is its own neighbour",
            "pipelines/evaluation/distances.py",
            "distances[own - rows.start, own] = np.inf",
            "pass",
            "test_manifolds.py::test_radii_on_a_line",
        ),
        Mutant(
            "precision is recall",
            "pipelines/evaluation/distances.py",
            "precision=float(looks_real.mean())",
            "precision=float(covered.mean())",
            "test_manifolds.py::test_few_but_true_and_many_but_false",
        ),
        Mutant(
            "coverage counts the balls of the set",
            "pipelines/evaluation/distances.py",
            "reached |= in_real.any(axis=0)",
            "reached |= (distances <= other.radii[rows, None]).any(axis=0)",
            "test_manifolds.py::test_in_numpy_whatever_the_blocks",
        ),
        Mutant(
            "the balls are those of the other set",
            "pipelines/evaluation/distances.py",
            "distances <= other.radii[rows, None]",
            "distances <= real.radii",
            "test_manifolds.py::test_in_numpy_whatever_the_blocks",
        ),
        Mutant(
            "PSNR takes the peak for its square",
            "vqvae/metrics.py",
            "255.0**2 / mse",
            "255.0 / mse",
            "test_metrics.py::test_psnr",
        ),
        Mutant(
            "the nearest image is the farthest",
            "pipelines/evaluation/distances.py",
            "distances.argmin(axis=1)",
            "distances.argmax(axis=1)",
            "test_manifolds.py::test_nearest_is_that_of_all_pairs",
        ),
    ],
    "Networks are those of the papers": [
        Mutant(
            "a normalized block has no shortcut",
            "vqvae/resnet.py",
            "return h + (self.shortcut(x) if self.shortcut.built else x)",
            "return h",
            "test_resnet.py::test_block_in_numpy",
        ),
        Mutant(
            "the decoder has a block too few at each resolution",
            "vqvae/resnet.py",
            "range(residual_layers + 1)",
            "range(residual_layers)",
            "test_resnet.py::test_channels_and_blocks_at_each_resolution",
        ),
    ],
    "A time becomes a number of steps": [
        Mutant(
            "minutes are taken for seconds",
            "pipelines/budget.py",
            "scaled(config, 60 * minutes - used",
            "scaled(config, minutes - used",
            "test_budget.py::test_minutes_are_filled",
        ),
        Mutant(
            "what is not a step takes no time",
            "pipelines/budget.py",
            "seconds - (all_parts - steps)",
            "seconds",
            "test_budget.py::test_the_time_is_used_and_divided_as_in_the_preset",
        ),
        Mutant(
            "the network of the feature loss takes no time",
            "pipelines/budget.py",
            "lambda config: config.vqvae.feature_steps",
            "lambda config: 0",
            "test_budget.py::test_each_part_counts_what_it_does",
        ),
    ],
    "A person sees how far it is": [
        Mutant(
            "a log has a line for each epoch, however short",
            "vqvae/fitting/progress.py",
            "if is_log and not (self.bar.is_due or is_last):",
            "if False:",
            "test_progress.py::test_the_last_epoch_of_a_log_is_told_and_others_every_30_seconds",
        ),
        Mutant(
            "the bar is wider than the terminal",
            "vqvae/fitting/progress.py",
            "room - len(text) - 3)",
            "room - 3)",
            "test_progress.py::test_figures_come_first_and_the_bar_takes_the_rest",
        ),
        Mutant(
            "a bar does not know what comes after it",
            "pipelines/plan.py",
            "later += part.seconds",
            "later = part.seconds",
            "test_plan.py::test_a_bar_knows_what_comes_after_it",
        ),
        Mutant(
            "the final page loads itself again",
            "pipelines/report/page.py",
            "reload_seconds: int | None = None, slow_parts",
            "reload_seconds: int | None = 30, slow_parts",
            "test_live_report.py::test_a_page_shows_training_as_it_goes",
        ),
        Mutant(
            "a page that cannot be written ends the training",
            "pipelines/report/page.py",
            "except Exception as error:",
            "except KeyError as error:",
            "test_live_report.py::test_a_page_that_cannot_be_written_is_one_line",
        ),
        Mutant(
            "a longer training is advised where guidance is too strong",
            "pipelines/report/advice.py",
            "        or uniform_samples(facts)  # other",
            "        or False  # other",
            "test_advice.py::test_uniform_samples",
        ),
        Mutant(
            "what is wrong is also among what is good",
            "pipelines/report/advice.py",
            "        else:\n            passed.append(rule.checks)",
            "        passed.append(rule.checks)",
            "test_advice.py::test_what_is_wrong_is_not_among_what_is_good",
        ),
    ],
    "A finished model is replaced only when its stage can run": [
        Mutant(
            "it is deleted before what its stage reads is looked for",
            "pipelines/run.py",
            "_require_inputs(run, stages)\n                _remove_models(run, stages, retrain)",
            "_remove_models(run, stages, retrain)\n                _require_inputs(run, stages)",
            "test_run.py::test_a_finished_model_is_replaced_only_when_asked",
        ),
        Mutant(
            "stage 1 is trained again, and the prior of the one before is refused after it",
            "pipelines/run.py",
            'if alone and run.manifest("train-prior"):',
            'if alone and not run.manifest("train-prior"):',
            "test_run.py::test_a_finished_model_is_replaced_only_when_asked",
        ),
    ],
    "Nothing of the user's is deleted": [
        Mutant(
            "a run begins in a folder of photos",
            "vqvae/storage/run_folder.py",
            'if matching(self.folder(stage), "*"):',
            "if False:",
            "test_run.py::test_other_files_in_the_folder_of_a_stage_are_not_deleted",
        ),
        Mutant(
            "a stage leaves only its own files in its folder",
            "pipelines/stages/shards.py",
            "if path.name not in kept and _LEFT.fullmatch(path.name):",
            "if path.name not in kept:",
            "test_shards.py::test_removes_what_does_not_belong",
        ),
        Mutant(
            "a backup among checkpoints is of other settings",
            "vqvae/fitting/checkpoints.py",
            'if stale not in self.folders and re.fullmatch(r"[0-9a-f]{16}", stale.name):',
            "if stale not in self.folders and stale.is_dir():",
            "test_fitting.py::test_checkpoints_of_other_inputs_are_removed",
        ),
        Mutant(
            "a model is deleted before the other one is refused",
            "pipelines/run.py",
            "if retrain and stage in stages and stage not in retrain:",
            "if False:",
            "test_run.py::test_a_finished_model_is_replaced_only_when_asked",
        ),
        Mutant(
            "an interrupted retraining begins again",
            "pipelines/run.py",
            "goes_on = wanted == _retrained(run) and",
            "goes_on = False and",
            "test_run.py::test_an_interrupted_retraining_goes_on",
        ),
        Mutant(
            "more steps of both models delete the prior",
            "vqvae/storage/run_folder.py",
            'if len(longer) > 1 and self.trained_steps("train-prior"):',
            "if False:",
            "test_run.py::test_more_steps",
        ),
    ],
    "Large models and data are trained like small ones": [
        Mutant(
            "a checkpoint is read like a user's file, up to 1 GiB",
            "vqvae/fitting/checkpoints.py",
            "copy.write_bytes(read_regular(file, any_size=True))",
            "copy.write_bytes(read_regular(file))",
            "test_fitting.py::test_a_checkpoint_may_be_larger_than_other_files",
        ),
        Mutant(
            "streamed data always come with random numbers",
            "vqvae/fitting/data.py",
            "elif draws:",
            "elif True:",
            "test_data.py::test_streamed_without_random_numbers",
        ),
        Mutant(
            "codes are held as int32, which TensorFlow keeps on the CPU",
            "vqvae/fitting/program.py",
            'array.astype("int64") if array.dtype == "int32" else array',
            "array",
            "test_program.py::test_whole_numbers_are_held_where_a_gpu_can_read_them",
        ),
    ],
    "Metrics are of the models that the run has": [
        Mutant(
            "those of a replaced model are shown",
            "vqvae/storage/run_folder.py",
            'return found if found and found.get("models", models) == models else None',
            "return found or None",
            "test_run_folder.py::test_measures_are_of_the_present_models",
        ),
    ],
    "A second command in a folder is refused": [
        Mutant(
            "the lock of a living process does not count",
            "pipelines/lock.py",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            "test_run_lock.py::test_of_a_process_that_is_alive_or_dead",
        ),
        Mutant(
            "a command of another machine counts as dead while it gives signs",
            "pipelines/lock.py",
            "return found is not None",
            "return False",
            "test_run_lock.py::test_of_another_machine_goes_by_its_signs_of_life",
        ),
        Mutant(
            "a lock of this machine counts although the kernel has released it",
            "pipelines/lock.py",
            "is_flocked and holder.get",
            "not is_flocked and holder.get",
            "test_run_lock.py::test_of_this_kernel_the_flock_alone_counts",
        ),
        Mutant(
            "two that start at the same moment both begin",
            "pipelines/lock.py",
            'if holder is None or holder["token"] != own["token"]:',
            "if holder is None:",
            "test_run_lock.py::test_two_that_start_at_the_same_moment",
        ),
    ],
    "Wrong words are refused, with a hint": [
        Mutant(
            "a value above its range is allowed",
            "configs/fields.py",
            "maximum is not None and value > maximum",
            "maximum is not None and value > 2 * maximum",
            "test_configs.py::test_every_range_is_checked",
        ),
        Mutant(
            "no flag is close to another",
            "pipelines/cli/parser.py",
            "difflib.get_close_matches(wanted, spelled, n=1)",
            "[]",
            "test_stage_arguments.py::test_unknown_flags",
        ),
        Mutant(
            "guidance needs no images without a label",
            "configs/schema.py",
            "(has_labels and label_dropout)",
            "(has_labels or label_dropout)",
            "test_configs.py::test_checks_across_fields",
        ),
        Mutant(
            "a prior without classes can be guided",
            "configs/schema.py",
            "(has_labels and label_dropout)",
            "label_dropout",
            "test_sampler.py::test_an_unconditional_model_takes_neither_label_nor_guidance",
        ),
    ],
    "An image says what it was sampled with": [
        Mutant(
            "a picture does not hold its own index and label",
            "pipelines/sampling/sample.py",
            "json.dumps(samples.settings | own)",
            "json.dumps(samples.settings)",
            "test_sample_files.py::test_a_folder",
        ),
        Mutant(
            "the checkpoint depends on the date",
            "pipelines/sampling/api.py",
            'members.pop("metadata.json", None)',
            "members",
            "test_provenance.py::test_a_checkpoint_is_its_weights",
        ),
        Mutant(
            "a picture of another checkpoint is sampled again",
            "pipelines/sampling/sample.py",
            'facts["checkpoint"] != run.checkpoint',
            'facts["checkpoint"] is None',
            "test_provenance.py::test_another_checkpoint_is_refused",
        ),
        Mutant(
            "a small picture may list any number of images",
            "pipelines/sampling/sample.py",
            " <= max(1, pixels // _LEAST_PIXELS)",
            "",
            "test_provenance.py::test_text_of_another_kind",
        ),
    ],
    "An image of a seed is the same at any batch size": [
        Mutant(
            "the random numbers are those of the place in the batch",
            "prior/sampler.py",
            "uniforms(seed, indices[rows], layout.length)",
            "uniforms(seed, np.arange(len(indices[rows])), layout.length)",
            "test_sampler.py::test_images_do_not_depend_on_the_batch",
        ),
        Mutant(
            "images share random numbers",
            "prior/filters.py",
            "np.array([0, 0, 0, index]",
            "np.array([index, 0, 0, 0]",
            "test_uniforms.py::test_values_are_those_of_philox",
        ),
        Mutant(
            "each seed has the same numbers",
            "prior/filters.py",
            "key=seed % 2**128",
            "key=0",
            "test_uniforms.py::test_seeds_differ_and_may_be_any_integer",
        ),
    ],
    "The decoder is trained alone, on codes that stay": [
        Mutant(
            "the encoder is trained as well",
            "vqvae/finetuning/decoder.py",
            "latents = ops.stop_gradient(self.vqvae.quantize_images(images).quantized)",
            "latents = self.vqvae.encoder(images)",
            "test_finetuning.py::test_losses_have_their_weights",
        ),
        Mutant(
            "the adversarial loss trains the discriminator",
            "vqvae/finetuning/decoder.py",
            "[ops.stop_gradient(weight) for weight in weights]",
            "weights",
            "test_finetuning.py::test_each_loss_moves_one_part",
        ),
        Mutant(
            "the adversarial loss may use weights after their update",
            "vqvae/finetuning/decoder.py",
            "[ops.stop_gradient(weight) for weight in weights]",
            "[ops.stop_gradient(weight) for weight in self.trainable_variables]",
            "test_finetuning.py::test_weights_are_read_before_their_update",
        ),
        Mutant(
            "the discriminator's loss trains the decoder",
            "vqvae/finetuning/decoder.py",
            "logits(weights, ops.stop_gradient(reconstruction))",
            "logits(weights, reconstruction)",
            "test_finetuning.py::test_each_loss_moves_one_part",
        ),
        Mutant(
            "feature vectors keep their length",
            "vqvae/finetuning/features.py",
            "ops.split(found / length, 2)",
            "ops.split(found, 2)",
            "test_finetuning.py::test_distance_in_numpy",
        ),
        Mutant(
            "images are turned the other way",
            "vqvae/finetuning/features.py",
            "ops.rot90(images, k, axes=(1, 2))",
            "ops.rot90(images, -k, axes=(1, 2))",
            "test_finetuning.py::test_turned_images",
        ),
    ],
    "New images cost only themselves": [
        Mutant(
            "images that are there are encoded again",
            "pipelines/stages/encode_source.py",
            "for key, image in pairs if key not in known",
            "for key, image in pairs",
            "test_encode_source.py::test_new_images_cost_only_themselves",
        ),
        Mutant(
            "classes that are there get other numbers",
            "pipelines/stages/encode_source.py",
            "Labels((*before.names, *new), before.kind)",
            "Labels((*new, *before.names), before.kind)",
            "test_encode_source.py::test_new_images_cost_only_themselves",
        ),
    ],
    "Training starts from the weights of another run": [
        Mutant(
            "a class takes the embedding of the same number",
            "prior/training.py",
            "there[theirs.names.index(name)]",
            "there[number]",
            "test_init_from.py::test_embeddings_go_by_the_names_of_classes",
        ),
        Mutant(
            "a training that goes on needs the other run",
            "vqvae/training.py",
            "if run.parent(stage) is None or run.has_begun(stage):",
            "if run.parent(stage) is None:",
            "test_init_from.py::test_goes_on_exactly_without_the_parent",
        ),
        Mutant(
            "a longer training begins anew",
            "vqvae/storage/run_folder.py",
            "                self._take_along(stage, config)",
            "                pass",
            "test_init_from.py::test_a_finished_model_goes_on_as_if_it_had_not_ended",
        ),
    ],
    "Transforms give what the run gives": [
        Mutant(
            "all images of a batch have one label",
            "pipelines/elements.py",
            "            rows[number - first] = label",
            "            pass",
            "test_elements.py::test_images_are_those_of_sample",
        ),
    ],
    "Exported weights are what their names say elsewhere": [
        Mutant(
            "kernels are transposed",
            "pipelines/sampling/weights.py",
            "(3, 2, 0, 1)",
            "(3, 2, 1, 0)",
            "test_weights.py::test_what_is_written",
        ),
        Mutant(
            "pairs that are rotated stay half a head apart",
            "pipelines/sampling/weights.py",
            "[_interleaved_pairs(head) for head in",
            "[head for head in",
            "test_weights.py::test_the_prior_in_numpy",
        ),
        Mutant(
            "the norms of queries and keys keep the order of the other layout",
            "pipelines/sampling/weights.py",
            "_interleaved_pairs(_array(norm.scale))",
            "_array(norm.scale)",
            "test_weights.py::test_the_prior_in_numpy",
        ),
    ],
    "The studio shows what the run makes, to this machine alone": [
        Mutant(
            "it is served to the whole network",
            "pipelines/studio.py",
            'server_name="127.0.0.1"',
            'server_name="0.0.0.0"',
            "test_studio.py::test_the_command_says_its_address_and_ends_at_ctrl_c",
        ),
        Mutant(
            "uploads may have any size",
            "pipelines/studio.py",
            '            max_file_size="10mb",\n',
            "",
            "test_studio.py::test_the_command_says_its_address_and_ends_at_ctrl_c",
        ),
        Mutant(
            "what is painted over is kept",
            "pipelines/sampling/input_images.py",
            "np.asarray(shares) < 0.1",
            "np.asarray(shares) >= 0.1",
            "test_studio.py::test_a_cell_is_sampled_if_a_tenth_of_it_is_painted",
        ),
        Mutant(
            "the codes of another cell are offered",
            "pipelines/studio.py",
            "cell[0] * codes.shape[1] + cell[1]",
            "cell[1] * codes.shape[1] + cell[0]",
            "test_studio.py::test_what_could_stand_at_a_cell",
        ),
        Mutant(
            "a picture knows codes that are not sampled yet",
            "pipelines/studio.py",
            "np.where(known, flat, flat[lengths - 1][:, None])",
            "np.where(known, flat, flat)",
            "test_studio.py::test_the_codes_one_by_one",
        ),
    ],
    "Metrics are written once an epoch, and where to changes no result": [
        Mutant(
            "an epoch that is trained once more has two lines",
            "vqvae/fitting/metric_writers.py",
            ' if int(line["epoch"]) <= epochs]',
            "]",
            "test_metric_writers.py::test_lines_of_epochs_that_come_once_more_are_replaced",
        ),
        Mutant(
            "the line of an epoch is written after its checkpoint",
            "vqvae/fitting/fit.py",
            """                    WrittenMetrics(writers, schedule, progress, program),
                    progress,
                    checkpoints,
""",
            """                    progress,
                    checkpoints,
                    WrittenMetrics(writers, schedule, progress, program),
""",
            "test_fitting.py::test_metrics_are_written_once_an_epoch_whatever_was_killed",
        ),
        Mutant(
            "another --log needs another run folder",
            "vqvae/storage/run_folder.py",
            '_name(change) != "log" and ',
            "",
            "test_run_folder.py::test_where_metrics_are_written_may_change_at_any_time",
        ),
    ],
    "The wheel has all that vqbeam needs": [
        Mutant(
            "the template of the report is not in it",
            "setup.py",
            'package_data={"vqbeam.pipelines.report": ["*.html"]}',
            "package_data={}",
            "test_package.py::test_the_wheel_has_every_file_of_the_packages",
        ),
    ],
}


if __name__ == "__main__":
    sys.exit(main())
