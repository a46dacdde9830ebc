#!/usr/bin/env bash
# Hugging Face $HF_DIR -> $CKPT_SAVE_DIR, a checkpoint that loads into any layout.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tiny_inputs
run python tools/convert_checkpoint.py \
    --load-model-type hf \
    --save-model-type mcore \
    --load-dir "$HF_DIR" \
    --save-dir "${CKPT_SAVE_DIR:-$MCORE_DIR}" \
    "$@"
