"""The command that runs the unfinished stages of a run as one Beam pipeline."""

import dataclasses
import math
import time
from collections.abc import Sequence

from vqbeam.configs import Config, VqbeamError, override
from vqbeam.pipelines.errors import if_removed
from vqbeam.pipelines.inspect import duration
from vqbeam.pipelines.lock import locked
from vqbeam.pipelines.paths import (
    absolute,
    check_shared,
    is_dataflow,
    runs_here,
    source_paths,
    with_absolute_paths,
)
from vqbeam.vqvae.storage.files import matching, read_json, remove, write_json
from vqbeam.vqvae.storage.labels import NO_CLASS, Labels
from vqbeam.vqvae.storage.run_folder import HASH_DIGITS, MODELS, STAGES, RunFolder

# Maximum number of classes in the closing lines.
_NAMES_SHOWN = 10
_RETRAINED = ".retrained.json"


def run_stages(
    config: Config,
    run_dir: str,
    stages: Sequence[str],
    beam_args: Sequence[str],
    retrain: Sequence[str] = (),
    minutes: float | None = None,
    extend: bool = False,
) -> None:
    """Runs stages of a run, one after the other, as one pipeline.

    Args:
        config: The run's config, which the first call stores in the folder and later calls check.
        run_dir: The run's folder.
        stages: Names from `STAGES`, in order.
        beam_args: Beam's own options, such as `["--runner=FnApiRunner"]`.
        retrain: Stages whose folders are deleted first, so that their models are trained again.
        minutes: Time for all stages. If the run has begun, its training steps are kept; otherwise
            they are chosen to take that time on this machine.
        extend: Whether models may have more steps than before; see `RunFolder.start`.

    Raises:
        VqbeamError: The folder holds another run, another command is running in it, an earlier
            stage is missing, a finished model would be replaced, workers elsewhere could not read
            a path, `init_from` names a run without such a model, or a stage failed for a reason
            that the user can fix.
    """
    run = RunFolder(run_dir)
    config = dataclasses.replace(config, data=with_absolute_paths(config.data))
    if is_dataflow(beam_args):
        if minutes:
            raise VqbeamError("--minutes is for training on this machine; set the steps instead")
        check_shared({"--run-dir": run_dir})
        if "prepare" in stages and not run.is_done("prepare"):
            check_shared(source_paths(config.data))
    if config.vqvae.init_from or config.prior.init_from:
        config = _with_parents(config, run, is_dataflow(beam_args))
    if not run.exists():
        # First, so that a mistyped dataset or folder does not create a run.
        run.check_free()
        _require_inputs(run, stages)
        if "prepare" in stages:
            from vqbeam.pipelines.sources import open_source

            open_source(config.data).check()
    trials = None
    if minutes:
        config, trials = _fitted(config, minutes, run)
    is_done = run.exists() and run.load_config() == config and run.done(stages) == set(stages)
    if is_done and not retrain and not extend:
        _tell_what_is_done(run, stages)
    else:
        # The config is written only while holding the lock.
        with locked(run.root, "--run-dir"):
            run.start(config, extend)
            with if_removed(run.exists, run.root):
                _require_inputs(run, stages)
                _remove_models(run, stages, retrain)
                _do(run, config, stages, beam_args, trials)
                if all(map(run.is_done, _retrained(run))):
                    (run.root / _RETRAINED).unlink(missing_ok=True)
    for line in _closing_lines(run, stages):
        print(line)


def _require_inputs(run: RunFolder, stages: Sequence[str]) -> None:
    """Checks the results that stages read and that are not made by one of them."""
    for stage in stages:
        for source in STAGES[stage][1]:
            if source not in stages:
                run.require(source)


def _remove_models(run: RunFolder, stages: Sequence[str], retrain: Sequence[str]) -> None:
    """Deletes the models to train again; their stages must be able to run.

    If this command has been interrupted before, it deletes nothing a second time.

    Raises:
        VqbeamError: A finished prior would be left over, or another model would be refused.
    """
    for stage in MODELS:
        if retrain and stage in stages and stage not in retrain:
            run.check_replaceable(stage)
    alone = {*retrain} == {"train-vqvae"} and "train-prior" in stages
    if alone and run.manifest("train-prior"):
        raise VqbeamError(
            f"{run.folder('train-prior')} holds a prior of the model that --retrain train-vqvae "
            "replaces; add --retrain train-prior, or give another --run-dir to keep both"
        )
    wanted = sorted({*retrain})
    goes_on = wanted == _retrained(run) and not any(map(run.is_stale, wanted))
    if wanted and not goes_on:
        for stage in wanted:
            for path in matching(run.folder(stage), "*"):  # the folder may be a link
                remove(path)
        write_json(run.root / _RETRAINED, wanted)


def _retrained(run: RunFolder) -> list[str]:
    """Returns the stages whose models are being trained again."""
    path = run.root / _RETRAINED
    return read_json(path, list) if path.exists() else []


def _with_parents(config: Config, run: RunFolder, elsewhere: bool) -> Config:
    """Returns the config with the hash of each model added to its `init_from`: `PATH@HASH`.

    If both stages name the same run, it may lack one of the two models.
    """
    from vqbeam.pipelines.hub import local_run

    before = run.load_config() if run.exists() else None
    found, missing = {}, {}
    for stage, section in {"train-vqvae": "vqvae", "train-prior": "prior"}.items():
        given = getattr(config, section).init_from
        stored = before and getattr(before, section).init_from
        if given is None or given == stored:  # as in the command that a report shows
            continue
        path = absolute(local_run(given))
        if elsewhere:
            check_shared({"--init-from": path})
        if stored and stored.rpartition("@")[0] == path:
            found[f"{section}.init_from"] = stored  # even if the other run has changed since
        elif model := RunFolder(path).result_hash(stage):
            found[f"{section}.init_from"] = f"{path}@{model[:HASH_DIGITS]}"
        else:
            missing[f"{section}.init_from"] = path, stage
    named = {value.rpartition("@")[0] for value in found.values()}
    for path, stage in missing.values():
        if path not in named:
            raise VqbeamError(
                f"{path} has no finished {stage} stage to start from; give another run with "
                "--init-from"
            )
    return override(config, found | dict.fromkeys(missing))


def _fitted(config: Config, minutes: float, run: RunFolder) -> tuple[Config, dict | None]:
    """Returns the config with the steps for a given time, and the trials for them, if any."""
    from vqbeam.pipelines.budget import fit_to_minutes, survey, with_steps_of

    if run.exists():
        return with_steps_of(config, run.load_config()), None
    try:
        counts, unit = survey(run, config)
    except VqbeamError:  # the dataset is not downloaded yet
        counts, unit = {}, None
    return fit_to_minutes(config, minutes, counts, unit)


def _do(
    run: RunFolder,
    config: Config,
    stages: Sequence[str],
    beam_args: Sequence[str],
    trials: dict | None,
) -> None:
    start = time.monotonic()
    pending = _pending(run, stages)
    _tell_what_is_done(run, [stage for stage in stages if stage not in pending])
    if not pending:
        return
    if "prepare" in pending:
        from vqbeam.pipelines.sources import open_source

        open_source(config.data).download(beam_args)
    from vqbeam.pipelines.plan import announce

    announce(run, config, pending, trials, here=runs_here(beam_args))
    _run_pipeline(run, pending, beam_args)
    if {*pending} & {*MODELS, "sample"}:
        from vqbeam.pipelines.report.page import written

        written(run)
    print(f"{' → '.join(pending)}: done in {duration(time.monotonic() - start)}")


def _tell_what_is_done(run: RunFolder, stages: Sequence[str]) -> None:
    for stage in stages:
        print(f"{stage}: done already, in {run.folder(stage)}")


def _pending(run: RunFolder, stages: Sequence[str]) -> list[str]:
    """Returns the stages to run: those not done, and those that read what these write."""
    done = run.done(stages)
    pending: list[str] = []
    for stage in stages:
        if stage not in done or any(source in pending for source in STAGES[stage][1]):
            pending.append(stage)
    for stage in pending:
        run.check_replaceable(stage)
    return pending


def _run_pipeline(run: RunFolder, stages: Sequence[str], beam_args: Sequence[str]) -> None:
    import apache_beam as beam

    from vqbeam.pipelines.beam import run_pipeline
    from vqbeam.pipelines.stages.transforms import transform

    def build(pipeline):
        runs = pipeline | beam.Create([absolute(str(run.root))])
        for stage in stages:
            runs = runs | stage >> transform(stage, gpu_hint=is_dataflow(beam_args))

    run_pipeline(beam_args, build)


def _closing_lines(run: RunFolder, stages: Sequence[str]) -> list[str]:
    """Returns lines about the results and the next command."""
    lines = []
    if "prepare" in stages:
        images = run.require("prepare")
        counts = ", ".join(f"{count:,} {split}" for split, count in images["counts"].items())
        lines.append(f"images: {counts}, in {run.folder('prepare')}")
        if images.get("label_names"):
            lines.append(_labels_line(images))
        if left_out := images.get("left_out"):
            named = ", ".join(f"{what} ({count:,})" for what, count in sorted(left_out.items()))
            lines.append(f"left out: {named}")
        letters = run.folder("prepare") / "dead_letters.jsonl"
        wrong = {
            "could not be decoded": images["failed"],
            "colours taken as they are": images.get("noted"),
        }
        for what, count in wrong.items():
            if count:
                lines.append(f"{what}: {count} image{'s' * (count > 1)}, listed in {letters}")
    lines += _quality_lines(run, stages)
    if "sample" in stages:
        lines.append(f"new images: {run.folder('sample') / 'samples.png'}")
        if (run.root / "report.html").exists():
            lines.append(f"all about the run, in a browser: {run.root / 'report.html'}")
        lines.append(f"next: vqbeam sample {run.root} --output samples.png")
    else:
        lines.append(f"written to {run.folder(stages[-1])}")
        lines.append(f"next: {_next_command(run, stages[-1])}")
    return lines


def _labels_line(images: dict) -> str:
    """Returns a line with the first labels and their numbers of training images, to check them."""
    labels, counts = Labels.of(images), images["statistics"]["images_per_label"]
    names = labels.names
    shown = [f"{name} {counts.get(str(n), 0):,}" for n, name in enumerate(names[:_NAMES_SHOWN])]
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    none = f", without a class {counts[str(NO_CLASS)]:,}" if str(NO_CLASS) in counts else ""
    return f"{labels.kind}, {len(names):,}: {', '.join(shown)}{more}{none} (training images)"


def _quality_lines(run: RunFolder, stages: Sequence[str]) -> list[str]:
    """Returns lines on how good the models of the stages are, in figures and what to compare."""
    lines, codes = [], run.load_config().vqvae.num_codes
    made = {stage: manifest for stage in stages if (manifest := run.manifest(stage))}
    if "train-vqvae" in made:
        measures = made["train-vqvae"]["measures"]
        psnr, picture = measures["psnr"], run.folder("train-vqvae") / "reconstructions.png"
        lines.append(f"held-out reconstructions: {picture}")
        lines.append(f"their PSNR: {psnr:.1f} dB (20 is blurry, 30 is close to the original)")
    if "encode" in made:
        used = made["encode"]["codes_used"]
        levels = used if isinstance(used, list) else [used]
        lines.append(f"codes in use: {', '.join(f'{n:,} of {codes:,}' for n in levels)}")
    if "train-prior" in made:
        nats = made["train-prior"]["measures"]["nats_per_code"]
        even = math.log(codes)
        lines.append(
            f"prior: {nats:.2f} nats per code (guessing evenly costs {even:.2f}; less is better)"
        )
    return lines


def _next_command(run: RunFolder, stage: str) -> str:
    following = list(STAGES)[list(STAGES).index(stage) + 1]
    if following == "sample":
        return f"vqbeam sample {run.root} --output samples.png"
    return f"vqbeam {following} with the same preset and settings"
