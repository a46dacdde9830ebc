#!/usr/bin/env bash
# A run of Stage 1 in $CKPT_LOAD_DIR -> Hugging Face, $CKPT_SAVE_DIR (default: export in the run).
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

convert_to_hf "$@"
