#!/usr/bin/env bash
# Baseline on Qwen3-8B, TP 4 x PP 2 on 8 devices: full softmax with --optimizer adamw.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage1 adamw --loss full --optimizer adamw "$@"
