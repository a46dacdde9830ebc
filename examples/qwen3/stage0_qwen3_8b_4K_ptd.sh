#!/usr/bin/env bash
# Stage 0 of Qwen3-8B, TP 4 x PP 2 on 8 devices: corpus -> candidate store $STORE_DIR. Run it once.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage0 "$@"
