"""Checks the job submitted to Dataflow, with stand-ins for the service and its storage."""

import base64
import bz2
import contextlib
import os
import re
import subprocess
import sys
import tarfile
import zlib

import pytest
from commands import ROOT
from pipeline_fixtures import small_config, write_images, write_preset

pytestmark = pytest.mark.cloud

IMAGE = "region-docker.pkg.dev/project/images/vqbeam:1"
ACCELERATOR = "beam:resources:accelerator:v1"


@pytest.fixture(scope="module")
def submitted(tmp_path_factory):
    """Submits a whole run; returns the jobs that the service got, the storage and the output."""
    from cloud_storage import storage
    from dataflow_service import dataflow_service

    folder = tmp_path_factory.mktemp("dataflow")
    config = small_config("folder:gs://bucket/source")
    preset = write_preset(folder / "preset.py", config)
    with storage(folder) as bucket, dataflow_service() as (address, jobs):
        write_images(folder / "source", 4)
        bucket.upload(folder / "source")
        words = ["run", str(preset), "--run-dir", "gs://bucket/run", "--runner=DataflowRunner"]
        words += ["--project=project", "--region=region", f"--dataflow_endpoint={address}"]
        words += ["--temp_location=gs://bucket/tmp", f"--sdk_container_image={IMAGE}"]
        words += [f"--setup_file={ROOT / 'setup.py'}"]
        done = subprocess.run(
            [sys.executable, "-m", "vqbeam", *words],
            cwd=folder,
            env=os.environ | bucket.environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        yield jobs, bucket.download(folder / "bucket"), done


@pytest.fixture(scope="module")
def pipeline(submitted):
    """The pipeline that was staged."""
    from apache_beam.portability.api import beam_runner_api_pb2

    _, bucket, done = submitted
    found = list((bucket / "tmp").rglob("pipeline.pb"))
    assert len(found) == 1, done.stderr
    return beam_runner_api_pb2.Pipeline.FromString(found[0].read_bytes())


def steps(pipeline):
    """The transforms that run code, by their full names."""
    return {
        transform.unique_name: pipeline.components.environments[transform.environment_id]
        for transform in pipeline.components.transforms.values()
        if transform.environment_id and not transform.subtransforms
    }


def test_the_job_is_submitted(submitted):
    jobs, _, done = submitted
    assert len(jobs) == 1, done.stderr
    assert jobs[0]["type"] == 1  # a batch job, in the numbers of the interface
    # Nothing was done, and it says so: the stand-in only takes the job.
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert "gs://bucket/run has no finished prepare stage" in lines[-1]
    # Where to watch it.
    told = [line.removeprefix("Dataflow: ") for line in lines if line.startswith("Dataflow: ")]
    assert told[0] == "Created job with id: [job-1]"
    assert "console.cloud.google.com/dataflow/jobs/region/job-1?project=project" in told[1]


def test_the_training_steps_alone_ask_for_a_gpu(pipeline):
    asked = {}
    for name, environment in steps(pipeline).items():
        hints = {hint: value.decode() for hint, value in environment.resource_hints.items()}
        asked[name] = hints
    training = {name for name in asked if name.startswith("train-")}
    assert len(training) == 2
    for name, hints in asked.items():
        if name in training:
            assert hints[ACCELERATOR] == "type:nvidia-l4;count:1;install-nvidia-driver"
            assert int(hints["beam:resources:min_ram_bytes:v1"]) == 16 * 10**9
        else:
            assert hints == {}, name


def test_all_steps_run_in_the_image(pipeline):
    from apache_beam.portability.api import beam_runner_api_pb2

    for name, environment in steps(pipeline).items():
        payload = beam_runner_api_pb2.DockerPayload.FromString(environment.payload)
        assert payload.container_image == IMAGE, name


def test_the_source_is_packaged(submitted, tmp_path):
    _, bucket, _ = submitted
    (package,) = (bucket / "tmp").rglob("workflow.tar.gz")
    with tarfile.open(package) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ours = {
        str(path.relative_to(ROOT))
        for package in ("vqbeam", "configs", "vqvae", "prior", "pipelines")
        for path in (ROOT / package).rglob("*.py")
    }
    assert len(ours) > 90 and ours <= names and "README.md" in names


def pickled(pipeline):
    """What Beam has packed into the steps, unpacked."""
    for transform in pipeline.components.transforms.values():
        for word in re.findall(rb"[A-Za-z0-9+/]{60,}={0,2}", transform.spec.payload):
            for unpack in (bz2.decompress, zlib.decompress):
                with contextlib.suppress(ValueError, OSError, EOFError, zlib.error):
                    yield unpack(base64.b64decode(word))


def test_no_path_of_this_machine_is_left(submitted, pipeline):
    import apache_beam

    _, bucket, _ = submitted
    content = pipeline.SerializeToString() + b"".join(pickled(pipeline))
    assert b"gs://bucket/run" in content, "what is pickled was not found"
    # Beam's own lambdas carry the names of their files, for tracebacks.
    content = content.replace(os.path.dirname(apache_beam.__file__).encode(), b"")
    for place in (str(ROOT), str(bucket.parent), os.path.expanduser("~"), sys.prefix):
        assert place.encode() not in content, place


def test_the_image_fits_what_is_pinned():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    dockerfile = (ROOT / "Dockerfile").read_text()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"FROM apache/beam_python{python}_sdk:{pins['apache-beam']} AS beam" in dockerfile
    assert f"FROM python:{python}" in dockerfile
    for setting in ("XLA_PYTHON_CLIENT_PREALLOCATE=false", "TF_FORCE_GPU_ALLOW_GROWTH=true"):
        assert setting in dockerfile
    for line in dockerfile.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
