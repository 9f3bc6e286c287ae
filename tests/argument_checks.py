"""Helpers shared by the tests of the command line."""

import pytest

from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.parser import UsageError

PRESET = """
from vqbeam.configs import Config, DataConfig, VQVAEConfig

CONFIG = Config(name="own", data=DataConfig(source="glyphs"), vqvae=VQVAEConfig(num_codes=100))
"""


def refusal(*words):
    """Returns the one-line error for a command line that is refused."""
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)
