#!/usr/bin/env bash
# The last steps of ascend.Dockerfile: docker/steps/ascend.sh KERNELS, 0 or 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kernels=$1
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
install=(python3 -m pip install --no-cache-dir --no-build-isolation -e ".[npu,report]")
if [[ $kernels == 1 ]]; then
  docker/steps/with_cann.sh "${install[@]}"
else
  env -u ASCEND_HOME_PATH "${install[@]}"
fi
