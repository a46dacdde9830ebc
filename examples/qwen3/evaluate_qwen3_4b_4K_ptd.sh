#!/usr/bin/env bash
# The base and every exported run of Qwen3-4B: SQL execution, answers, perplexities -> evaluation.json.
# What is measured depends on what is set: SQL_QUESTIONS and DATABASE, TASK_DATA, GENERAL_TEXT.
QWEN3=4b TP=${TP:-4} PP=${PP:-1}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate "$@"
