"""What must be the same in every process, computed in this one and in one other."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vqbeam.pipelines.sources import glyphs
from vqbeam.vqvae.storage.records import serialize

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import json, sys
sys.path.insert(0, "tests")
from test_another_process import glyph, serialized
print(json.dumps([glyph(), serialized()]))
"""


def glyph():
    """The hash of a drawn letter."""
    return hashlib.sha256(glyphs.draw_glyph(5, 7)[0].tobytes()).hexdigest()


def serialized():
    """A record, from its fields in two orders."""
    values = {"codes": np.arange(4, dtype="uint16").reshape(2, 2), "key": "k", "label": 1}
    orders = ("codes", "key", "label"), ("label", "key", "codes")
    return [serialize({name: values[name] for name in order}).hex() for order in orders]


@pytest.fixture(scope="module")
def elsewhere():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_glyph(elsewhere):
    assert elsewhere[0] == glyph()


def test_the_bytes_of_a_record(elsewhere):
    # Left alone, protobuf orders the features by an address, which differs between processes.
    lines = elsewhere[1] + serialized()
    assert len(lines) == 4 and len(set(lines)) == 1
    names = [bytes.fromhex(lines[0]).index(name) for name in (b"codes", b"key", b"label")]
    assert names == sorted(names)
