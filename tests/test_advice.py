import pathlib
import shlex

import pytest

from vqbeam.configs import load_preset, override
from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.report import advice
from vqbeam.pipelines.report.advice import RULES, findings
from vqbeam.pipelines.report.facts import Facts

# Figures that are healthy for the preset cifar10.
ENCODED = {"codes_used": 512, "perplexity": 475.0}
VQVAE = [0.0615, 0.0561, 0.0540, 0.0508, 0.0496, 0.0492]
PRIOR = [5.60, 5.40, 5.30, 5.24, 5.20, 5.18]
MEASURED = {
    "real": {"frechet": 0.05, "precision": 0.82, "recall": 0.82, "agreement": 0.75},
    "reconstructions": {"frechet": 1.9, "precision": 0.90, "recall": 0.87, "agreement": 0.70},
    "samples": {"frechet": 4.0, "precision": 0.80, "recall": 0.50, "agreement": 0.65},
    "nearest": {"median": 0.95, "held_out": 1.0, "pairs": []},
    "settings": {"guidance": 1.5, "temperature": 0.95},
}


def prepared(*counts):
    """What `prepare` says of classes with so many training images."""
    per_label = {str(number): count for number, count in enumerate(counts) if count}
    return {
        "label_kind": "classes",
        "label_names": [f"class {number}" for number in range(len(counts))],
        "statistics": {"images_per_label": per_label},
    }


def facts(
    encoded=None,
    vqvae=VQVAE,
    prior=PRIOR,
    training=None,
    measured=None,
    images=(90, 110),
    **settings,
):
    """The facts of a healthy run, with some of them changed."""
    training = training or [loss - 0.05 for loss in prior]
    return Facts(
        root="runs/a b",
        config=override(
            load_preset("cifar10"), {name.replace("__", "."): v for name, v in settings.items()}
        ),
        manifests={
            "prepare": prepared(*images),
            "train-vqvae": {},
            "encode": encoded or ENCODED,
            "train-prior": {},
        },
        histories={
            "train-vqvae": [{"loss": loss, "val_loss": loss} for loss in vqvae],
            "train-prior": [
                {"loss": of, "val_loss": held_out}
                for of, held_out in zip(training, prior, strict=True)
            ],
        },
        prior={name: of | (measured or {}).get(name, {}) for name, of in MEASURED.items()},
    )


def titles(known):
    return [finding.title for finding in findings(known)[0]]


def only(known):
    """The only finding."""
    (finding,) = findings(known)[0]
    return finding


def test_a_healthy_run_has_no_finding():
    assert findings(facts()) == ([], [rule.checks for rule in RULES], [])


@pytest.mark.parametrize(
    ("images", "title", "evidence"),
    [
        ((100, 9, 191), "A class is rare", "“class 1” has 9 training images, and a class has 100"),
        ((100, 10, 190), None, ""),
        ((5, 0, 295), "2 classes are rare", "“class 1” has 0 training images"),
    ],
)
def test_rare_classes(images, title, evidence):
    known = facts(images=images)
    assert titles(known) == ([title] if title else [])
    if title:
        assert only(known).evidence.startswith(evidence)


def test_what_is_wrong_is_not_among_what_is_good():
    found, passed, left_out = findings(facts(encoded={"codes_used": 9, "perplexity": 5}))
    assert [finding.title for finding in found] == ["The codebook has collapsed"]
    assert passed == [rule.checks for rule in RULES if rule.checks != "codebook in use"]
    assert left_out == []


def test_images_without_classes():
    known = facts(images=(1, 199))
    known.manifests["prepare"] |= {"label_names": [], "label_kind": "classes"}
    assert findings(known)[::2] == ([], ["no class is rare"])


def test_attributes_may_be_rare():
    known = facts(images=(1, 199))
    known.manifests["prepare"]["label_kind"] = "attributes"
    assert findings(known)[::2] == ([], ["no class is rare"])


@pytest.mark.parametrize(
    ("encoded", "is_found"),
    [
        ({"codes_used": 255, "perplexity": 200}, True),
        ({"codes_used": 256, "perplexity": 200}, False),
        ({"codes_used": 500, "perplexity": 127}, True),
        ({"codes_used": 500, "perplexity": 128}, False),
        ({"codes_used": [512, 40], "perplexity": [480, 30]}, True),
        ({"codes_used": [512, 400], "perplexity": [480, 300]}, False),
    ],
)
def test_a_collapsed_codebook(encoded, is_found):
    assert titles(facts(encoded=encoded)) == ["The codebook has collapsed"] * is_found


def test_the_level_that_has_collapsed_is_named():
    finding = only(facts(encoded={"codes_used": [512, 40], "perplexity": [480, 30]}))
    assert finding.evidence.startswith("At level 1, 40 of 512 codes are used, about as many as 30")


@pytest.mark.parametrize("quantizer", ["vector", "predictive", "simvq", "lfq", "fsq"])
def test_advice_fits_the_quantizer(quantizer):
    finding = only(
        facts(
            encoded={"codes_used": 9, "perplexity": 5},
            vqvae__quantizer=quantizer,
            **({"vqvae__code_dim": 9, "vqvae__balance": 0.0} if quantizer == "lfq" else {}),
            **({"vqvae__estimator": "straight_through"} if quantizer in ("lfq", "fsq") else {}),
            **({"vqvae__balance": 0.0} if quantizer in ("fsq", "simvq") else {}),
            **({"vqvae__codebook_init": "data"} if quantizer == "simvq" else {}),
        )
    )
    words = ["--vqvae.quantizer", quantizer] if quantizer != "fsq" else []
    extra = {
        "simvq": ["--vqvae.balance", "0"],
        "lfq": "--vqvae.balance 0 --vqvae.code-dim 9 --vqvae.estimator straight_through".split(),
        "fsq": "--vqvae.balance 0 --vqvae.estimator straight_through".split(),
    }.get(quantizer, [])
    parse(["run", "cifar10", "--run-dir", "d", *words, *extra, *finding.command.split()])


@pytest.mark.parametrize(
    ("prior", "training", "is_found"),
    [
        ([5.0, 4.0, 4.05], [5.0, 4.0, 3.5], True),
        ([5.0, 4.0, 4.03], [5.0, 4.0, 3.5], False),  # less than a hundredth
        ([5.0, 4.0, 4.05], [5.0, 4.0, 4.1], False),  # both rise: that is not memory
    ],
)
def test_a_prior_that_memorizes(prior, training, is_found):
    found = titles(facts(prior=prior, training=training))
    assert found == ["The prior memorizes the training images"] * is_found


def test_early_stopping_leaves_nothing_to_say_of_a_rise():
    known = facts(prior=[5, 4, 4.2], training=[5, 4, 3], prior__early_stopping=2)
    assert titles(known) == []


@pytest.mark.parametrize(("median", "is_found"), [(0.49, True), (0.51, False)])
def test_copied_images(median, is_found):
    found = titles(facts(measured={"nearest": {"median": median}}))
    assert found == ["Samples resemble training images closely"] * is_found


def test_training_images_that_hold_all_held_out_ones_say_nothing():
    assert titles(facts(measured={"nearest": {"median": 0.0, "held_out": 0.0}})) == []


@pytest.mark.parametrize(
    ("recall", "precision", "guidance", "title"),
    [
        (0.43, 0.80, 2.0, "Guidance is too strong"),
        (0.43, 0.80, 1.0, "Samples vary too little"),
        (0.44, 0.80, 2.0, None),  # half of what reconstructions reach, which is 0.87
        (0.43, 0.73, 2.0, None),  # bad images, not uniform ones
        (0.43, 0.14, 3.9, "The prior limits the quality of samples"),
        (0.43, 0.14, 4.0, "Guidance is too strong"),  # so strong that images are distorted
    ],
)
def test_uniform_samples(recall, precision, guidance, title):
    changed = {
        "samples": {"recall": recall, "precision": precision},
        "settings": {"guidance": guidance},
    }
    known = facts(measured=changed)
    assert titles(known) == ([title] if title else [])
    if title and not title.startswith("The prior"):
        assert f"guidance {guidance:g}" in only(known).evidence
        assert ("right but alike" in only(known).advice) == (precision == 0.80)
        verb, arguments = parse(shlex.split(only(known).command)[1:])
        assert (verb, arguments["run_dir"], arguments["store"]) == ("evaluate", "runs/a b", True)


@pytest.mark.parametrize(
    ("reconstructions", "real", "is_found"),
    [(2.1, 0.05, True), (2.0, 0.05, False), (2.1, 1.1, False)],
)
def test_a_stage_1_that_limits_the_samples(reconstructions, real, is_found):
    changed = {"reconstructions": {"frechet": reconstructions}, "real": {"frechet": real}}
    found = titles(facts(measured=changed))
    assert found == ["Stage 1 limits the quality of samples"] * is_found


@pytest.mark.parametrize(
    ("precision", "reconstructions", "is_found"),
    [(0.61, 1.9, True), (0.62, 1.9, False), (0.61, 2.05, False)],
)
def test_a_prior_that_limits_the_samples(precision, reconstructions, is_found):
    changed = {
        "samples": {"precision": precision},
        "reconstructions": {"frechet": reconstructions},
    }
    found = titles(facts(measured=changed))
    assert ("The prior limits the quality of samples" in found) == is_found
    assert len(found) == (1 if is_found or reconstructions > 2 else 0)


@pytest.mark.parametrize("preset", ["cifar10", "glyphs", "fashion_mnist"])
def test_more_finetuning_is_advised(preset):
    known = facts(measured={"reconstructions": {"frechet": 3.0}})
    known = Facts(**{**vars(known), "config": load_preset(preset)})
    command = only(known).command
    config = parse(["run", preset, "--run-dir", "d", *command.split()])[1]["config"]
    assert config.vqvae.finetune_steps > load_preset(preset).vqvae.finetune_steps


@pytest.mark.parametrize(
    ("vqvae", "prior", "expected"),
    [
        # After a power law of L, twice the steps bring 1 − 2^−L.
        ([1, 2**-0.33, 3**-0.33], PRIOR, ["Stage 1 stopped early"]),
        ([1, 2**-0.31, 3**-0.31], PRIOR, []),  # 19%
        (VQVAE, [5, 5 * 2**-0.16, 5 * 3**-0.16], ["The prior stopped early"]),
        (VQVAE, [5, 5 * 2**-0.14, 5 * 3**-0.14], []),  # 9%
        ([1.0, 0.5], PRIOR, []),  # too few epochs to tell
    ],
)
def test_trainings_that_stopped_early(vqvae, prior, expected):
    assert titles(facts(vqvae=vqvae, prior=prior)) == expected


@pytest.mark.parametrize(
    ("stage", "title"), [("vqvae", "Stage 1 stopped early"), ("prior", "The prior stopped early")]
)
def test_few_steps_are_too_few_however_flat_the_loss(stage, title):
    assert titles(facts(**{f"{stage}__steps": 500})) == []
    finding = only(facts(**{f"{stage}__steps": 499}))
    assert finding.title == title and finding.evidence.startswith("It was trained for 499 steps")
    assert finding.command == f"--{stage}.steps 1000"
    # Few are enough from trained weights, and where the loss rises already.
    assert titles(facts(**{f"{stage}__steps": 9, f"{stage}__init_from": "runs/a"})) == []
    rising = {stage: [5.0, 4.0, 4.05]}
    assert title not in titles(facts(**rising, **{f"{stage}__steps": 9}))


def test_the_gain_of_more_steps_is_that_of_the_power_law():
    finding = only(facts(vqvae=[n**-0.5 for n in range(1, 6)]))
    assert f"by {1 - 2**-0.5:.0%}" in finding.evidence
    assert finding.command == "--vqvae.steps 9000"


def test_what_is_not_there_is_not_checked():
    known = Facts("d", load_preset("cifar10"), {}, {"train-vqvae": [], "train-prior": []})
    assert findings(known) == ([], [], [rule.checks for rule in RULES])
    left_out = dict.fromkeys(("frechet", "precision", "recall", "agreement"))
    measured = dict.fromkeys(("real", "reconstructions", "samples"), left_out)
    known = Facts(
        **{**vars(facts()), "prior": measured | {"nearest": None, "settings": {}}},
    )
    assert [rule.checks for rule in RULES[-4:]] == findings(known)[2]


def test_the_page_states_every_threshold():
    """docs/report.md has the list of rules; a changed threshold must be changed there."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / "report.md").read_text("utf-8")
    text = " ".join(text.split())
    for value in (
        f"{advice._RARE:.0%} of the mean",
        f"{advice._LEAST_USED:.0%} of the codes",
        f"below {advice._LEAST_PERPLEXITY:.0%} of their number",
        f"{advice._RISE - 1:.0%} above its minimum",
        f"{advice._NEAREST} times",
        f"{advice._LEAST_RECALL:.0%} of that of reconstructions",
        f"{advice._LEAST_PRECISION:.0%} of that of real images",
        f"guidance is at least {advice._STRONG_GUIDANCE:g}",
        f"{advice._SHARE_OF_FRECHET:.0%} of that of samples",
        f"{advice._SHARE_OF_FRECHET:.0%} of theirs",
        f"{advice._LEAST_OF_PRIOR:.0%} of that of real images",
        f"{advice._TIMES_REAL:g} times that of real images",
        f"{advice._STILL_FALLING['train-vqvae']:.0%} (stage 1)",
        f"{advice._STILL_FALLING['train-prior']:.0%} (prior)",
        f"{advice._FEWEST_EPOCHS} epochs",
        f"fewer than {advice._FEWEST_STEPS} steps",
    ):
        assert value in text, value
