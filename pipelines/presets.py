"""The presets that a run may start from, and their settings, as a page of text."""

from typing import Any

from vqbeam import configs


def describe(preset: str | None = None) -> str:
    """Returns the name and the summary of each preset, a line each; or the settings of one.

    Args:
        preset: A name or the path of a .py file, as `configs.load_preset` takes it.

    Raises:
        VqbeamError: There is no such preset.
    """
    if preset is not None:
        return _settings(preset)
    names = configs.preset_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {configs.preset_summary(name)}" for name in names)


def _settings(preset: str) -> str:
    """Returns a line for each flag that the preset has set, with its value and what it is."""
    config = configs.load_preset(preset)
    rows = [
        (f"--{name.replace('_', '-')}", _written(_value(config, name)), field.metadata["help"])
        for name, field, _ in configs.field_types()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{flag:<{widths[0]}}  {value:<{widths[1]}}  {text}" for flag, value, text in rows]
    return "\n".join([configs.preset_summary(preset), *lines])


def _value(config: configs.Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _written(value: Any) -> str:
    """Returns a value as it is typed."""
    return "none" if value is None else str(value)
