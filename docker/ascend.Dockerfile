# Ascend 910B. From the repository's root:
#   docker build -f docker/ascend.Dockerfile -t megatron-replay:ascend .
#   docker/run.sh megatron-replay:ascend
# CANN, torch_npu and Python must fit each other (megatron_replay/platform/cann.py, docs/ascend.md):
# the first step refuses a pair known not to, and warns of one that is not known. This project has neither built nor run it.
ARG CANN=9.1.0
ARG PYTHON=3.11
FROM quay.io/ascend/cann:${CANN}-910b-ubuntu22.04-py${PYTHON}
ARG CANN
ARG PYTHON
ARG TORCH_NPU=2.12.0
# 1 builds the kernels of csrc/ascend with CANN's compiler; 0 leaves them out.
ARG KERNELS=1
ARG SOC_VERSION=Ascend910B3
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

COPY megatron_replay/platform/cann.py /tmp/cann.py
RUN python3 /tmp/cann.py --cann "${CANN}" --torch-npu "${TORCH_NPU}" --python "${PYTHON}"

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make cmake \
    && rm -rf /var/lib/apt/lists/*

# torch first, of the release that torch_npu was built for: CPU wheels, NPUs need no other.
RUN TORCH="$(python3 -c "import sys; sys.path.insert(0, '/tmp'); import cann; \
        print(cann.torch_for('${TORCH_NPU}'))")" \
    && python3 -m pip install --no-cache-dir "torch==${TORCH}" \
        --extra-index-url https://download.pytorch.org/whl/cpu \
    && python3 -m pip install --no-cache-dir "torch_npu==${TORCH_NPU}" "setuptools>=68" "pybind11>=2.12"

WORKDIR /workspace/megatron_replay
COPY . .
# set_env.sh sets ASCEND_HOME_PATH, with which setup.py builds the NPU's kernels. torch's autoload of
# torch_npu is off, because there is no device while an image is built.
RUN docker/steps/ascend.sh "${KERNELS}"

ENV CUDA_DEVICE_MAX_CONNECTIONS=1 \
    HCCL_CONNECT_TIMEOUT=3600 \
    HCCL_EXEC_TIMEOUT=3600 \
    PYTORCH_NPU_ALLOC_CONF=expandable_segments:True \
    TASK_QUEUE_ENABLE=2 \
    CPU_AFFINITY_CONF=1
ENTRYPOINT ["docker/steps/with_cann.sh"]
CMD ["python3", "tools/doctor.py", "--platform", "npu"]
