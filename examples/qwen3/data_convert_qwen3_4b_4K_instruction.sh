#!/usr/bin/env bash
# Rows of $INPUT_FILE -> corpus $DATA_PATH.{bin,idx,loss_mask,json}; only answers carry loss.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

convert_data "$@"
