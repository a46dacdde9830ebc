# NVIDIA GPUs. From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t megatron-replay:cuda .
#   docker run --gpus all --ipc=host megatron-replay:cuda
# Not built nor run by this project.
ARG BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace/megatron_replay
COPY . .
# torch is the image's: pip keeps what is there.
RUN python -m pip install --no-cache-dir "setuptools>=68" "pybind11>=2.12" \
    && python -m pip install --no-cache-dir --no-build-isolation -e ".[report]"
ENV CUDA_DEVICE_MAX_CONNECTIONS=1
CMD ["python", "tools/doctor.py", "--platform", "cuda"]
