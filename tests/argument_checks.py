"""What the tests of the command line share."""

import pytest

from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.parser import UsageError

PRESET = """
from vqbeam.configs import Config, DataConfig, VQVAEConfig

CONFIG = Config(name="own", data=DataConfig(source="glyphs"), vqvae=VQVAEConfig(num_codes=100))
"""


def refusal(*words):
    """Returns the one line with which a command line is refused."""
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)
