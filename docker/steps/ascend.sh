#!/usr/bin/env bash
# The last steps of ascend.Dockerfile: docker/steps/ascend.sh KERNELS APEX, each 0 or 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
with_cann=$PWD/docker/steps/with_cann.sh
kernels=$1 apex=$2
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
install=(python3 -m pip install --no-cache-dir --no-build-isolation -e .)
if [[ $kernels == 1 ]]; then
  "$with_cann" "${install[@]}"
else
  env -u ASCEND_HOME_PATH "${install[@]}"
fi
if [[ $apex == 1 ]]; then
  git clone --depth 1 https://gitcode.com/Ascend/apex.git /tmp/apex
  python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  (cd /tmp/apex && "$with_cann" bash scripts/build.sh --python="$python")
  python3 -m pip install --no-cache-dir /tmp/apex/apex/dist/apex-*.whl
fi
