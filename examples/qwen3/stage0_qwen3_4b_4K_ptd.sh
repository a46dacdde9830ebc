#!/usr/bin/env bash
# Stage 0 of Qwen3-4B, TP 4 on 4 devices: corpus -> candidate store $STORE_DIR. Run it once.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage0 "$@"
