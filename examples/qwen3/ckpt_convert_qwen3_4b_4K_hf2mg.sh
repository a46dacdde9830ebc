#!/usr/bin/env bash
# Hugging Face $HF_DIR -> $CKPT_SAVE_DIR, a file a rank, for MindSpeed-LLM; nothing here needs it.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tiny_inputs
run python tools/convert_checkpoint.py \
    --load-model-type hf \
    --save-model-type mg \
    --load-dir "$HF_DIR" \
    --save-dir "${CKPT_SAVE_DIR:-$RUN_DIR/mg}" \
    --target-tensor-parallel-size "$TP" \
    --target-pipeline-parallel-size "$PP" \
    "$@"
