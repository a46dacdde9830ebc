#!/usr/bin/env bash
# evaluation.json and the runs' logs -> report.md, report.json, report.png in $RUN_DIR.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUNS=()
for metrics in "$RUN_DIR"/*/metrics.jsonl; do
    run_dir=$(dirname "$metrics")
    [[ ! -d $run_dir/export ]] || RUNS+=(--run "$(basename "$run_dir")=$run_dir")
done
run python tools/report.py --evaluation "$RUN_DIR/evaluation.json" "${RUNS[@]}" \
    --output-dir "$RUN_DIR" "$@"
