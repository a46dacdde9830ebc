#!/usr/bin/env bash
# Hugging Face $HF_DIR -> $CKPT_SAVE_DIR, one file per rank, for MindSpeed-LLM.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

convert_to_mg "$@"
