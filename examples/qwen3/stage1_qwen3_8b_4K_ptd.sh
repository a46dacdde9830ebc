#!/usr/bin/env bash
# Stage 1 of Qwen3-8B, TP 4 x PP 2 on 8 devices: restricted cross-entropy with MoClip.
# OPTIMIZER=adamw, mofo, muonclip, adamuon or tam trains a baseline with the full softmax instead.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage1 "$@"
