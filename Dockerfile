# The image of Dataflow's workers, with and without a GPU; docs/dataflow.md says how it is used.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM python:3.11-slim
# Beam starts and watches the worker; the GPU's driver is mounted by Dataflow.
COPY --from=beam /opt/apache/beam /opt/apache/beam
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PIP_NO_CACHE_DIR=1

# tensorflow or jax: which of them trains, with CUDA.
ARG KERAS_BACKEND=tensorflow
ENV KERAS_BACKEND=${KERAS_BACKEND}

# As `vqbeam` sets for itself: several processes of a worker can share its GPU.
ENV XLA_PYTHON_CLIENT_PREALLOCATE=false \
    TF_FORCE_GPU_ALLOW_GROWTH=true

WORKDIR /vqbeam
# What seldom changes comes first, so that a new version of vqbeam is a small layer.
COPY constraints.txt ./
RUN pip install -c constraints.txt "apache-beam[gcp]" tensorflow-datasets keras-nlp matplotlib \
 && if [ "$KERAS_BACKEND" = jax ]; then pip install -c constraints.txt "jax[cuda12]"; \
    else pip install -c constraints.txt "tensorflow[and-cuda]"; fi
COPY setup.py pyproject.toml README.md LICENSE ./
COPY vqbeam vqbeam
COPY configs configs
COPY vqvae vqvae
COPY prior prior
COPY pipelines pipelines
RUN pip install -c constraints.txt ".[gcp]"

ENTRYPOINT ["/opt/apache/beam/boot"]
