#!/usr/bin/env bash
# Stage 0 of Qwen3-8B, TP 4 x PP 2 on 8 devices: corpus -> candidate store $STORE_DIR. Once for all Stage 1 runs.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SELECTION=(
    --coverage 0.95
    --max-candidates 200
    --position-strategy bucket
    --num-buckets 5
    --position-fraction 0.5
)
launch megatron_replay.stage0 \
    --load "${CKPT_LOAD_DIR:-$MODEL_DIR}" \
    --data-path "$DATA_PATH" \
    --store "$STORE_DIR" \
    --seq-length "$SEQ_LENGTH" \
    --micro-batch-size "${MBS:-1}" \
    --long-documents "${LONG_DOCUMENTS:-error}" \
    --bf16 \
    --tensorboard-dir "$RUN_DIR/tensorboard/stage0" \
    "${LAYOUT[@]}" \
    "${SELECTION[@]}" \
    "$@"
