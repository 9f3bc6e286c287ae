"""Rules that find faults of a run in its manifests and metrics; docs/report.md lists them.

Each rule is a function from the facts to a finding, or to None if there is nothing to report.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from vqbeam.pipelines.report.facts import Facts
from vqbeam.vqvae.storage.labels import Labels

# A class is rare if it has less than this share of the mean number of images per class.
_RARE = 0.1
# A codebook has collapsed if the perplexity, or the codes in use, are below these shares of K.
_LEAST_PERPLEXITY, _LEAST_USED = 0.25, 0.5
# A prior memorizes if the held-out loss is above its minimum by this factor.
_RISE = 1.01
# Samples are copies if their distance to training images is below this share of that of held-out
# images.
_NEAREST = 0.5
# Samples are uniform if their recall is below the first share of that of reconstructions, while
# their precision is at least the second share of that of real images. The precision is not required
# with guidance of the last value or more, which distorts images and so lowers their precision.
_LEAST_RECALL, _LEAST_PRECISION, _STRONG_GUIDANCE = 0.5, 0.9, 4.0
# Stage 1 limits the samples if the Fréchet distance of reconstructions is above this share of that
# of samples, and above this multiple of that of real images.
_SHARE_OF_FRECHET, _TIMES_REAL = 0.5, 2.0
# The prior limits the samples if their precision is below this share of that of real images, and
# stage 1 does not limit them by the share above.
_LEAST_OF_PRIOR = 0.75
# A loss is still falling if, at its current pace, twice the steps would lower it by this share.
_STILL_FALLING = {"train-vqvae": 0.2, "train-prior": 0.1}
_FEWEST_EPOCHS = 3
# With fewer steps, losses are no evidence: they level off anyway as the learning rate decays.
_FEWEST_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault, the evidence for it, and what to try.

    Attributes:
        title: The fault.
        evidence: The figures that show it.
        advice: What to do, in words.
        command: A command, or flags to add to the training command; "" if no flag helps.
    """

    title: str
    evidence: str
    advice: str
    command: str


def collapsed_codebook(facts: Facts) -> Finding | None:
    """Finds a level of the codebook with few codes in use."""
    encoded, settings = facts.manifests["encode"], facts.config.vqvae
    levels = zip(
        np.atleast_1d(encoded["codes_used"]), np.atleast_1d(encoded["perplexity"]), strict=True
    )
    of, single = settings.num_codes, np.ndim(encoded["codes_used"]) == 0
    for level, (used, spread) in enumerate(levels):
        if used < _LEAST_USED * of or spread < _LEAST_PERPLEXITY * of:
            return Finding(
                "The codebook has collapsed",
                f"{'' if single else f'At level {level}, '}{used:,} of {of:,} codes are used, "
                f"about as many as {spread:,.0f} used equally (perplexity).",
                "Images are described with fewer codes than there could be, which costs detail. "
                "Train stage 1 with more pressure to use all codes.",
                _AGAINST_COLLAPSE.get(settings.quantizer, _AGAINST_COLLAPSE["vector"]),
            )
    return None


_AGAINST_COLLAPSE = {
    "vector": "--vqvae.codebook-init kmeans --vqvae.restart-below 0.1 --vqvae.balance 0.2",
    "simvq": "--vqvae.codebook-init data --vqvae.entropy 0.1",
    "lfq": "--vqvae.entropy 0.1",
    "fsq": "--vqvae.quantizer fsq --vqvae.fsq-levels 8,5,5",
}


def memorizing_prior(facts: Facts) -> Finding | None:
    """Finds a prior whose held-out loss rises while its training loss falls."""
    history, settings = facts.histories["train-prior"], facts.config.prior
    losses = [epoch["val_loss"] for epoch in history]
    best, last = int(np.argmin(losses)), len(losses) - 1
    falls = history[last]["loss"] < history[best]["loss"]
    # With early stopping, the weights are those of the best epoch.
    if settings.early_stopping or not falls or losses[last] < _RISE * losses[best]:
        return None
    dropout = 0.1 if settings.dropout < 0.1 else 0.3
    return Finding(
        "The prior memorizes the training images",
        f"The held-out loss was lowest after epoch {best + 1}, at {losses[best]:.3f} nats per "
        f"code, and rose to {losses[last]:.3f}, while the training loss fell from "
        f"{history[best]['loss']:.3f} to {history[last]['loss']:.3f}.",
        "Stop at the best epoch, regularize more, or train on more images.",
        f"--prior.early-stopping 2 --prior.dropout {dropout}",
    )


def copied_images(facts: Facts) -> Finding | None:
    """Finds samples that are much nearer to training images than held-out images are."""
    found = facts.prior["nearest"]
    ratio = found["median"] / found["held_out"] if found["held_out"] else 1.0
    if ratio >= _NEAREST:
        return None
    return Finding(
        "Samples resemble training images closely",
        f"Their median distance to the nearest training image is {ratio:.2f} times that of "
        "held-out images, which the model has never seen.",
        "Look at the closest pairs under Metrics. If they are copies, train the prior for fewer "
        "steps or regularize it more.",
        "--prior.early-stopping 2 --prior.dropout 0.3",
    )


def uniform_samples(facts: Facts) -> Finding | None:
    """Finds samples much less varied than real images that are as precise, or strongly guided."""
    real, best, found = (facts.prior[name] for name in ("real", "reconstructions", "samples"))
    settings = facts.prior["settings"]
    precise = found["precision"] >= _LEAST_PRECISION * real["precision"]
    if found["recall"] >= _LEAST_RECALL * best["recall"] or not (
        precise or settings["guidance"] >= _STRONG_GUIDANCE
    ):
        return None
    used = ", ".join(f"{name} {settings[name]:g}" for name in ("guidance", "temperature"))
    guided = settings["guidance"] > 1
    return Finding(
        "Guidance is too strong" if guided else "Samples vary too little",
        f"Recall is {found['recall']:.2f}, against {best['recall']:.2f} for reconstructions, at a "
        f"precision of {found['precision']:.2f} (real images: {real['precision']:.2f}); sampled "
        f"with {used}.",
        f"Samples look {'right but alike' if precise else 'alike, and distorted'}. Measure weaker "
        "settings, and keep the best.",
        f"vqbeam evaluate {shlex.quote(facts.root)} --sweep "
        + ("guidance=1,1.5,2 temperature=0.9,1" if guided else "temperature=0.9,1 top_k=0 top_p=1")
        + " --store",
    )


def limiting_decoder(facts: Facts) -> Finding | None:
    """Finds samples whose distance from real images is mostly that of reconstructions."""
    real, best, found = (
        facts.prior[name]["frechet"] for name in ("real", "reconstructions", "samples")
    )
    share = best / found if found else 0.0
    if share <= _SHARE_OF_FRECHET or best <= _TIMES_REAL * real:
        return None
    settings = facts.config.vqvae
    steps = 2 * settings.finetune_steps or max(1, settings.steps // 3)
    perceptual, adversarial = settings.perceptual or 1.0, settings.adversarial or 0.05
    return Finding(
        "Stage 1 limits the quality of samples",
        f"Reconstructions alone have a Fréchet distance of {best:.2f}, {share:.0%} of the "
        f"{found:.2f} of samples (real images: {real:.2f}).",
        "A better prior would help little. Train the decoder further for sharper images, or give "
        "stage 1 more codes or steps.",
        f"--vqvae.finetune-steps {steps} --vqvae.perceptual {perceptual:g} "
        f"--vqvae.adversarial {adversarial:g}",
    )


def limiting_prior(facts: Facts) -> Finding | None:
    """Finds samples that do not look like real images, although reconstructions do."""
    real, best, found = (facts.prior[name] for name in ("real", "reconstructions", "samples"))
    if (
        found["precision"] >= _LEAST_OF_PRIOR * real["precision"]
        or best["frechet"] > _SHARE_OF_FRECHET * found["frechet"]
        or uniform_samples(facts)  # other settings cost no training
    ):
        return None
    return Finding(
        "The prior limits the quality of samples",
        f"Only {found['precision']:.0%} of them look like a held-out image (precision; real "
        f"images: {real['precision']:.0%}), and their Fréchet distance is {found['frechet']:.2f}, "
        f"against {best['frechet']:.2f} for reconstructions.",
        "Stage 1 is good enough. Train the prior for longer, or make it larger.",
        f"--prior.steps {2 * facts.config.prior.steps}",
    )


def _ended_early(stage: str, title: str, flag: str) -> Callable[[Facts], Finding | None]:
    """Returns a rule that finds a training with too few steps or a loss that is still falling."""

    def rule(facts: Facts) -> Finding | None:
        losses = [epoch["val_loss"] for epoch in facts.histories[stage]]
        section = facts.config.vqvae if stage == "train-vqvae" else facts.config.prior
        steps, rises = section.steps, losses[-1] >= _RISE * min(losses)
        epochs, gain = len(losses), _gain_of_twice_the_steps(losses)
        if steps < _FEWEST_STEPS and not rises and not section.init_from:
            evidence = f"It was trained for {steps:,} steps, and even small models need thousands."
        elif epochs >= _FEWEST_EPOCHS and gain >= _STILL_FALLING[stage]:
            evidence = (
                f"The held-out loss fell from {losses[-2]:.4g} to {losses[-1]:.4g} in the last of "
                f"{epochs} epochs. At this pace, twice the steps would lower it by {gain:.0%}."
            )
        else:
            return None
        longer = max(2 * steps, 2 * _FEWEST_STEPS)
        action = "Train for longer, in a new folder or with --extend."
        return Finding(title, evidence, action, f"{flag} {longer}")

    return rule


def _gain_of_twice_the_steps(losses: list[float]) -> float:
    """Returns the share by which a loss would fall, continuing its last epoch's power law."""
    if len(losses) < 2 or min(losses[-2:]) <= 0:
        return 0.0
    epochs = len(losses)
    slope = math.log(losses[-2] / losses[-1]) / math.log(epochs / (epochs - 1))
    return 1 - 2**-slope


unconverged_vqvae = _ended_early("train-vqvae", "Stage 1 stopped early", "--vqvae.steps")
unconverged_prior = _ended_early("train-prior", "The prior stopped early", "--prior.steps")


def rare_class(facts: Facts) -> Finding | None:
    """Finds the class with the fewest training images, if they are few."""
    prepared = facts.manifests["prepare"]
    counts = prepared["statistics"]["images_per_label"]
    each = [counts.get(str(number), 0) for number in range(len(prepared["label_names"]))]
    least, mean = int(np.argmin(each)), np.mean(each)
    if each[least] >= _RARE * mean:
        return None
    rare = sum(of < _RARE * mean for of in each)
    return Finding(
        "A class is rare" if rare == 1 else f"{rare} classes are rare",
        f"“{prepared['label_names'][least]}” has {each[least]:,} training images, and a class has "
        f"{mean:,.0f} on average.",
        "The prior hardly sees such classes, and samples of them look like others, or like the few "
        "images there are. Add images of them, or leave them out.",
        "",
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule, what it checks, and whether a run has the facts for it.

    Attributes:
        checks: What is in order if it finds nothing.
        applies: Returns whether the facts are there.
        find: The rule.
    """

    checks: str
    applies: Callable[[Facts], Any]
    find: Callable[[Facts], Finding | None]


def _is_trained(stage: str) -> Callable[[Facts], bool]:
    return lambda facts: stage in facts.manifests and bool(facts.histories.get(stage))


def _measured(name: str) -> Callable[[Facts], bool]:
    return lambda facts: bool(facts.prior) and facts.prior["samples"].get(name) is not None


def _has_classes(facts: Facts) -> bool:
    prepared = facts.manifests.get("prepare")
    labels = Labels.of(prepared) if prepared else Labels()
    counted = labels.names and prepared.get("statistics", {}).get("images_per_label")
    return bool(counted) and labels.kind == "classes"


RULES = (
    Rule("no class is rare", _has_classes, rare_class),
    Rule("codebook in use", lambda facts: "encode" in facts.manifests, collapsed_codebook),
    Rule("stage 1 had enough steps", _is_trained("train-vqvae"), unconverged_vqvae),
    Rule("prior had enough steps", _is_trained("train-prior"), unconverged_prior),
    Rule("prior generalizes", _is_trained("train-prior"), memorizing_prior),
    Rule("samples are new", lambda f: bool(f.prior) and f.prior.get("nearest"), copied_images),
    Rule("samples are varied", _measured("recall"), uniform_samples),
    Rule("stage 1 is good enough", _measured("frechet"), limiting_decoder),
    Rule("prior is good enough", _measured("frechet"), limiting_prior),
)


def findings(facts: Facts) -> tuple[list[Finding], list[str], list[str]]:
    """Returns the findings, the checks that find nothing, and the checks that lack facts."""
    found, passed, left_out = [], [], []
    for rule in RULES:
        if not rule.applies(facts):
            left_out.append(rule.checks)
        elif finding := rule.find(facts):
            found.append(finding)
        else:
            passed.append(rule.checks)
    return found, passed, left_out
