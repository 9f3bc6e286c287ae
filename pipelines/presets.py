"""The presets that a run may start from, as a page of text."""

import configs


def describe() -> str:
    """Returns the name and the summary of each preset, a line each."""
    names = configs.preset_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {configs.preset_summary(name)}" for name in names)
