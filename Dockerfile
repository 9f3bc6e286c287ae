# The image of Dataflow's workers, with and without a GPU; docs/dataflow.md says how it is used.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM python:3.11-slim
# Beam starts and watches the worker; the GPU's driver is mounted by Dataflow.
COPY --from=beam /opt/apache/beam /opt/apache/beam
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PIP_NO_CACHE_DIR=1

WORKDIR /vqbeam
# What seldom changes comes first, so that a new version of vqbeam is a small layer.
COPY constraints.txt ./
RUN pip install -c constraints.txt "apache-beam[gcp]" tensorflow-datasets keras-nlp matplotlib \
 && pip install -c constraints.txt "tensorflow[and-cuda]"
COPY setup.py pyproject.toml README.md LICENSE ./
COPY vqbeam vqbeam
COPY configs configs
COPY vqvae vqvae
COPY prior prior
COPY pipelines pipelines
RUN pip install -c constraints.txt ".[gcp]"

ENTRYPOINT ["/opt/apache/beam/boot"]
