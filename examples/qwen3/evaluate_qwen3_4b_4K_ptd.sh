#!/usr/bin/env bash
# The base and every exported run of Qwen3-4B: SQL execution, answers, perplexities -> evaluation.json.
# What is measured depends on what is set: SQL_QUESTIONS and DATABASE, TASK_DATA, GENERAL_TEXT.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODELS=()
for export in "$RUN_DIR"/*/export; do
    [[ -d $export ]] && MODELS+=(--model "$(basename "$(dirname "$export")")=$export")
done
((${#MODELS[@]})) || [[ ${DRY_RUN:-0} == 1 ]] || fail "$RUN_DIR/*/export: no exported run; ckpt_convert_qwen3_4b_4K_mcore2hf.sh writes one"
INPUTS=()
[[ -z ${SQL_QUESTIONS:-} ]] || INPUTS+=(--sql-questions "$SQL_QUESTIONS" --database "$DATABASE")
[[ -z ${TASK_DATA:-} ]] || INPUTS+=(--task-data "$TASK_DATA")
[[ -z ${GENERAL_TEXT:-} ]] || INPUTS+=(--general-text "$GENERAL_TEXT")
case $PLATFORM in npu | cuda) DEVICE=(--device "$PLATFORM" --dtype bfloat16) ;; *) DEVICE=() ;; esac
run python tools/evaluate.py \
    --base "$HF_DIR" \
    "${MODELS[@]}" \
    "${INPUTS[@]}" \
    --data-path "$DATA_PATH" \
    --store "$STORE_DIR" \
    "${DEVICE[@]}" \
    --output "$RUN_DIR/evaluation.json" \
    "$@"
