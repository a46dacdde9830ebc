#!/usr/bin/env bash
# Stage 1 of Qwen3-4B, TP 4 on 4 devices: restricted cross-entropy with MoClip.
# OPTIMIZER=adamw, mofo, muonclip, adamuon or tam trains a baseline with the full softmax instead.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage1 "$@"
