# CPU only: tests and the quick start. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t megatron-replay:cpu .
# Its steps are those of the README: apt's compiler and venv, then `make setup`.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace/megatron_replay
COPY . .
RUN make setup
ENV PATH=/workspace/megatron_replay/.venv/bin:${PATH}
CMD ["python", "tools/doctor.py"]
