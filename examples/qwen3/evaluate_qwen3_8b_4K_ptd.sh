#!/usr/bin/env bash
# The base and every exported run of Qwen3-8B: SQL execution, answers, perplexities -> evaluation.json.
# What is measured depends on what is set: SQL_QUESTIONS and DATABASE, TASK_DATA, GENERAL_TEXT.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate "$@"
