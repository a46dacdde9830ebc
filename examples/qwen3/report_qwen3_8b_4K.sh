#!/usr/bin/env bash
# evaluation.json and the runs' logs -> report.md, report.json, report.png in $RUN_DIR.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

report "$@"
