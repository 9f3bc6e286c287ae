"""Run configs: validated dataclasses, presets and JSON conversion. Standard library only."""

from vqbeam.configs.fields import VqbeamError, first_line
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
    typed_settings,
)
from vqbeam.configs.schema import (
    LESS_MEMORY,
    SECTIONS,
    WITHOUT_CODEBOOK,
    Config,
    DataConfig,
    EncodeConfig,
    PriorConfig,
    SampleConfig,
    SamplerSettings,
    VQVAEConfig,
)

__all__ = [
    "LESS_MEMORY",
    "SECTIONS",
    "WITHOUT_CODEBOOK",
    "Config",
    "DataConfig",
    "EncodeConfig",
    "PriorConfig",
    "SampleConfig",
    "SamplerSettings",
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
    "typed_settings",
]
