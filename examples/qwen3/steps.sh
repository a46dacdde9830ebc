# The steps of the journey, in the order the data flows; sourced by common.sh. A script calls one.
# shellcheck shell=bash

convert_to_mcore() { # Hugging Face -> a checkpoint that loads into any layout
    tiny_inputs
    run python tools/convert_checkpoint.py --load-model-type hf --save-model-type mcore \
        --load-dir "$HF_DIR" --save-dir "${CKPT_SAVE_DIR:-$MCORE_DIR}" "$@"
}

convert_to_mg() { # Hugging Face -> a file a rank, for MindSpeed-LLM; nothing here needs it
    tiny_inputs
    run python tools/convert_checkpoint.py --load-model-type hf --save-model-type mg \
        --load-dir "$HF_DIR" --save-dir "${CKPT_SAVE_DIR:-$RUN_DIR/mg}" \
        --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" "$@"
}

convert_data() { # rows -> corpus $DATA_PATH.{bin,idx,loss_mask,json}; only answers carry loss
    tiny_inputs
    [[ -n ${INPUT_FILE:-} ]] || fail "INPUT_FILE is not set: a JSON-lines file of prompt/completion, alpaca, sharegpt or messages rows"
    run python tools/preprocess_data.py --input "$INPUT_FILE" --tokenizer "$TOKENIZER_PATH" \
        --output-prefix "$DATA_PATH" --show 2 "$@"
}

STAGES=( # what both stages are told
    --data-path "$DATA_PATH"
    --store "$STORE_DIR" # a baseline reads it for the probe of the mass outside the sets only
    --seq-length "$SEQ_LENGTH"
    --micro-batch-size "${MBS:-1}"
    --long-documents "${LONG_DOCUMENTS:-error}"
    --bf16
    "${LAYOUT[@]}"
)

stage0() { # corpus -> candidate store, once for all Stage 1 runs
    local selection=(
        --coverage 0.95
        --max-candidates 200
        --position-strategy bucket
        --position-fraction 0.5
    )
    launch megatron_replay.stage0 --load "${CKPT_LOAD_DIR:-$MODEL_DIR}" \
        "${STAGES[@]}" "${selection[@]}" "$@"
}

stage1() { # stage1 RUN FLAGS...: corpus and store -> checkpoints in $RUN_DIR/RUN
    local name=$1
    shift
    local training=(
        --global-batch-size "${GBS:-16}"
        --lr 1.25e-6
        --min-lr 1.25e-7
        --lr-decay-style cosine
        --weight-decay 0.1
        --clip-grad 1.0
        --adam-beta1 0.9
        --adam-beta2 0.95
        --save-interval 200
    )
    launch megatron_replay.stage1 --load "${CKPT_LOAD_DIR:-$MODEL_DIR}" \
        --save "${CKPT_SAVE_DIR:-$RUN_DIR/$name}" "${STAGES[@]}" "${training[@]}" "$@"
}

convert_to_hf() { # a Stage 1 run -> Hugging Face, in the run's export/ unless $CKPT_SAVE_DIR says other
    local run_dir=${CKPT_LOAD_DIR:-$RUN_DIR/moclip}
    run python tools/convert_checkpoint.py --load-model-type mcore --save-model-type hf \
        --load-dir "$run_dir" --save-dir "${CKPT_SAVE_DIR:-$run_dir/export}" \
        --params-dtype bfloat16 "$@"
}

evaluate() { # base and exported runs -> evaluation.json; what is measured depends on what is set
    local exported models=() inputs=() device=()
    for exported in "$RUN_DIR"/*/export; do
        [[ ! -d $exported ]] || models+=(--model "$(basename "$(dirname "$exported")")=$exported")
    done
    ((${#models[@]})) || [[ ${DRY_RUN:-0} == 1 ]] ||
        fail "$RUN_DIR/*/export: no exported run; ckpt_convert_qwen3_${QWEN3}_4K_mcore2hf.sh writes one"
    [[ -z ${SQL_DIR:-} ]] || inputs+=(--sql "$(basename "$SQL_DIR")=$SQL_DIR")
    [[ -z ${CHOICES:-} ]] || inputs+=(--choices "$(basename "$CHOICES" .jsonl)=$CHOICES")
    [[ -z ${GENERAL_CHOICES:-} ]] ||
        inputs+=(--general-choices "$(basename "$GENERAL_CHOICES" .jsonl)=$GENERAL_CHOICES")
    [[ -z ${TASK_DATA:-} ]] || inputs+=(--data "$TASK_DATA")
    [[ -z ${GENERAL_TEXT:-} ]] || inputs+=(--general-text "$GENERAL_TEXT")
    [[ $PLATFORM == cpu ]] || device=(--device "$PLATFORM" --dtype bfloat16)
    run python tools/evaluate.py --base "$HF_DIR" "${models[@]}" \
        "${inputs[@]}" --data-path "$DATA_PATH" --store "$STORE_DIR" "${device[@]}" \
        --output "$RUN_DIR/evaluation.json" "$@"
}

report() { # evaluation.json and the runs' logs -> report.md, report.json, report.png in $RUN_DIR
    local metrics runs=()
    for metrics in "$RUN_DIR"/*/metrics.jsonl; do
        metrics=$(dirname "$metrics")
        [[ ! -d $metrics/export ]] || runs+=(--run "$(basename "$metrics")=$metrics")
    done
    run python tools/report.py --evaluation "$RUN_DIR/evaluation.json" "${runs[@]}" \
        --output-dir "$RUN_DIR" "$@"
}
