#!/usr/bin/env bash
# Baseline on Qwen3-4B, TP 4 on 4 devices: full softmax with --optimizer tam.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage1 tam --loss full --optimizer tam "$@"
