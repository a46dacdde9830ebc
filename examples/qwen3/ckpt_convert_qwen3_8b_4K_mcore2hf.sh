#!/usr/bin/env bash
# A Stage 1 run $CKPT_LOAD_DIR -> Hugging Face, $CKPT_SAVE_DIR (default: export in the run).
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CKPT_LOAD_DIR=${CKPT_LOAD_DIR:-$RUN_DIR/moclip}
run python tools/convert_checkpoint.py \
    --load-model-type mcore \
    --save-model-type hf \
    --load-dir "$CKPT_LOAD_DIR" \
    --save-dir "${CKPT_SAVE_DIR:-$CKPT_LOAD_DIR/export}" \
    --params-dtype bfloat16 \
    "$@"
