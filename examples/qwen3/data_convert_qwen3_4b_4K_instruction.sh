#!/usr/bin/env bash
# Rows of $INPUT_FILE -> corpus $DATA_PATH.{bin,idx,loss_mask,json}; only answers carry loss.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tiny_inputs
[[ -n ${INPUT_FILE:-} ]] || fail "INPUT_FILE is not set: a JSON-lines file of prompt/completion, alpaca, sharegpt or messages rows"
run python tools/preprocess_data.py \
    --input "$INPUT_FILE" \
    --tokenizer "$TOKENIZER_PATH" \
    --output-prefix "$DATA_PATH" \
    --show 2 \
    "$@"
