"""What a run is: dataclasses with checks, presets, and their JSON form. Standard library only."""

from configs.errors import VqbeamError
from configs.loading import (
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
from configs.schema import (
    SECTIONS,
    Config,
    DataConfig,
    EncodeConfig,
    PriorConfig,
    SampleConfig,
    VQVAEConfig,
)

__all__ = [
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
    "from_dict",
    "load_preset",
    "override",
    "preset_names",
    "preset_summary",
    "smoke",
    "to_dict",
]
