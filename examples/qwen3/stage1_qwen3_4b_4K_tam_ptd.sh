#!/usr/bin/env bash
# Baseline on Qwen3-4B, TP 4 on 4 devices: full softmax with --optimizer tam.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LOSS=(
    --loss full
    --store "$STORE_DIR" # for the probe of the mass outside the candidate sets only
)
OPTIMIZER=(
    --optimizer tam
    --lr 1.25e-6
    --min-lr 1.25e-7
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.95
)
launch megatron_replay.stage1 \
    --load "${CKPT_LOAD_DIR:-$MODEL_DIR}" \
    --save "${CKPT_SAVE_DIR:-$RUN_DIR/tam}" \
    --data-path "$DATA_PATH" \
    --seq-length "$SEQ_LENGTH" \
    --micro-batch-size "${MBS:-1}" \
    --global-batch-size "${GBS:-16}" \
    --train-epochs 1 \
    --long-documents "${LONG_DOCUMENTS:-error}" \
    --save-interval 200 \
    --bf16 \
    --tensorboard-dir "$RUN_DIR/tensorboard/tam" \
    "${LAYOUT[@]}" \
    "${LOSS[@]}" \
    "${OPTIMIZER[@]}" \
    "$@"
