#!/usr/bin/env bash
# The base and every exported run of Qwen3-8B: SQL execution, answers, perplexities -> evaluation.json.
# Measures what these variables name: SQL_DIR, CHOICES, GENERAL_CHOICES, TASK_DATA, GENERAL_TEXT
# (docs/evaluation.md has their formats); further flags go to tools/evaluate.py.
QWEN3=8b TP=${TP:-4} PP=${PP:-2}
# shellcheck source=examples/qwen3/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate "$@"
