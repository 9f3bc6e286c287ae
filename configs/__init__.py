"""Run configs: validated dataclasses, presets and JSON conversion. Standard library only."""

from vqbeam.configs.errors import VqbeamError, first_line
from vqbeam.configs.loading import (
    differences,
    field_types,
    from_dict,
    load_preset,
    override,
    preset_names,
    preset_summary,
    smoke,
    to_dict,
)
from vqbeam.configs.schema import (
    HOW_MANY,
    SECTIONS,
    Config,
    DataConfig,
    EncodeConfig,
    PriorConfig,
    SampleConfig,
    VQVAEConfig,
)

__all__ = [
    "HOW_MANY",
    "SECTIONS",
    "Config",
    "DataConfig",
    "EncodeConfig",
    "PriorConfig",
    "SampleConfig",
    "VQVAEConfig",
    "VqbeamError",
    "differences",
    "field_types",
    "first_line",
    "from_dict",
    "load_preset",
    "override",
    "preset_names",
    "preset_summary",
    "smoke",
    "to_dict",
]
