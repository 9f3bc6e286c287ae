"""The command that shows the state of a run."""

import datetime

from etils import epath

from vqbeam.configs import WITHOUT_CODEBOOK, VqbeamError, VQVAEConfig
from vqbeam.vqvae.layout import CodeLayout, code_layout
from vqbeam.vqvae.storage.files import matching, modified, size
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, RunFolder


def describe(run_dir: str) -> str:
    """Returns the stages of a run with their state, time, size and metrics, as text.

    Raises:
        VqbeamError: There is no run in the folder.
    """
    run = RunFolder(run_dir)
    config = run.load_config()
    height, width, channels = config.image_shape
    lines = [
        f"run      {run.root}",
        f"preset   {config.name}, seed {config.seed}",
        f"data     {config.data.source}, {height}×{width}×{channels}",
        f"codes    {code_layout(config).describe()}, {_quantizer(config.vqvae)}",
    ]
    for stage, (folder, _) in STAGES.items():
        lines.append("")
        try:
            lines.append(f"{stage:<12} {_state(run, stage)}")
            lines += [f"  {line}" for line in _facts(run, stage)]
        except VqbeamError as error:
            lines.append(f"{stage:<12} damaged: {error}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            lines.append(f"{stage:<12} damaged: its manifest is not as vqbeam writes it ({error})")
        if (run.root / folder).exists():
            lines.append(f"  {run.root / folder}, {file_size(_size(run.root / folder))}")
    return "\n".join(lines)


def _quantizer(settings: VQVAEConfig) -> str:
    """Returns a text with the quantizer and the settings that it uses."""
    parts = [f"{settings.quantizer} quantizer"]
    if settings.quantizer not in WITHOUT_CODEBOOK:
        parts.append(f"D = {settings.code_dim}")
    if settings.quantizer in ("vector", "predictive", "residual"):
        parts.append(f"codebook by {settings.codebook_update}")
    return ", ".join(parts)


def _state(run: RunFolder, stage: str) -> str:
    manifest = run.manifest(stage)
    if manifest is None:
        if steps := run.trained_steps(stage):
            return f"begun, {steps:,} steps done"
        reports = run.folder(stage) / f".reports-{run.fingerprint(stage)}"
        if shards := matching(reports, "*.json"):
            return f"begun, {len(shards)} shards written"
        return "begun" if run.folder(stage).exists() else "not begun"
    if run.is_stale(stage):
        return "stale: made from inputs that have changed since"
    ended = datetime.datetime.fromtimestamp(modified(run.folder(stage) / MANIFEST))
    done = f"done in {duration(manifest['seconds'])}, {ended:%Y-%m-%d %H:%M}"
    if run.is_elsewhere(stage):
        return f"{done}; its files are not here"
    run.require(stage)  # raises if they are damaged
    return done


def _facts(run: RunFolder, stage: str) -> list[str]:
    manifest = run.manifest(stage)
    if manifest is None:
        return []
    match stage:
        case "prepare":
            labels = Labels.of(manifest)
            return [
                _counts(manifest["counts"], "images"),
                f"{len(labels.names)} {labels.kind}" if labels.names else "no classes",
                f"could not be decoded: {manifest['failed']}",
            ]
        case "train-vqvae":
            m = manifest["measures"]
            return [
                f"{manifest['parameters']:,} parameters, {_losses(manifest)}",
                f"held-out reconstruction: MSE {m['mse']:.1f} of 255², PSNR {m['psnr']:.2f} dB, "
                f"{m['reconstruction']:.4f} of the variance",
                f"held-out codebook use: perplexity {m['perplexity']:.0f}, "
                f"{m['codes_used']:.0%} of codes",
            ]
        case "encode":
            return [
                _counts(manifest["counts"], "grids"),
                *_codebook_use(manifest, code_layout(run.load_config())),
            ]
        case "train-prior":
            m = manifest["measures"]
            return [
                f"{manifest['parameters']:,} parameters, {_losses(manifest)}",
                f"held-out: {m['nats_per_code']:.3f} nats per code, "
                f"{m['bits_per_dim']:.4f} bits per dimension",
            ]
    return [", ".join(f"{name} {value}" for name, value in manifest["settings"].items())]


def _losses(manifest: dict) -> str:
    last = manifest["history"][-1]
    return f"last losses {last['loss']:.4f} in training, {last['val_loss']:.4f} held out"


def _codebook_use(manifest: dict, layout: CodeLayout) -> list[str]:
    """Returns a line for each level; for a single level the manifest has numbers, not lists."""
    if layout.levels == 1:
        uses = [("codebook use", manifest["perplexity"], manifest["codes_used"])]
    else:
        names = [f"codebook use, level {level}" for level in range(layout.levels)]
        uses = zip(names, manifest["perplexity"], manifest["codes_used"], strict=True)
    return [
        f"{name}: perplexity {perplexity:.0f}, {used} of {layout.num_codes} codes"
        for name, perplexity, used in uses
    ]


def _counts(counts: dict[str, int], what: str) -> str:
    parts = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return f"{sum(counts.values()):,} {what}: {parts}"


def _size(folder: epath.Path) -> int:
    return sum(
        _size(path) if path.is_dir() else size(path) or 0
        for path in folder.iterdir()
        if path.name != MANIFEST
    )


def file_size(size: float) -> str:
    """Returns a number of bytes as text, such as "12 MB" or "1.5 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def duration(seconds: float) -> str:
    """Returns a duration as text, such as "3 min 20 s" or "1.5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
