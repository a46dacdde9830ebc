# Sourced by every script of this folder: platform, environment, paths, launch, and the steps.
#
# A script sets QWEN3 (4b or 8b), TP and PP before it sources this file. The variables below may be
# set by the caller; relative paths start at the caller's directory.
#
#   PLATFORM        npu, cuda or cpu (default: detected)
#   OPTIMIZER       moclip (default), or a baseline: adamw, mofo, muonclip, adamuon, tam
#   NPUS_PER_NODE   processes on this node (TP x PP x DP / NNODES)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT      as for torchrun; on one node, any free port
#   HF_DIR          the Hugging Face checkpoint to start from
#   TOKENIZER_PATH  its tokenizer, or a sentencepiece model
#   INPUT_FILE      your rows (README.md describes the formats)
#   RUN_DIR         every output that has no variable of its own
#   DATA_PATH       prefix of the corpus; STORE_DIR the candidate store
#   CKPT_LOAD_DIR CKPT_SAVE_DIR   what a script reads and writes
#   DRY_RUN=1       print the commands without running them
#   MODEL_SIZE=tiny a small model of Qwen3's proportions and its own data, for a CPU;
#              =random  the true shape with random weights, and the same data
#
# Flags after a script's name are appended to its command: stage1_qwen3_4b_4K_ptd.sh --lr 1e-6
# Those of prompts (--no-chat-template, --system-prompt) belong to data_convert and evaluate alike.
# shellcheck shell=bash disable=SC2034  # the scripts use these variables
set -euo pipefail

absolute() { # absolute NAME...: make the paths in these variables absolute
    local name
    for name in "$@"; do
        [[ -z ${!name:-} ]] || printf -v "$name" '%s' "$(realpath -m -- "${!name}")"
    done
}
absolute HF_DIR TOKENIZER_PATH INPUT_FILE RUN_DIR DATA_PATH STORE_DIR CKPT_LOAD_DIR CKPT_SAVE_DIR \
    SQL_DIR CHOICES GENERAL_CHOICES GENERAL_TEXT TASK_DATA LOG_DIR
SCRIPT=$(basename "$0" .sh)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() { echo "error: $*" >&2 && exit 2; }

# ---------------------------------------------------------------- platform and environment
find_platform() {
    if compgen -G '/dev/davinci[0-9]*' >/dev/null; then
        echo npu
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        echo cuda
    else
        echo cpu
    fi
}
PLATFORM=${PLATFORM:-$(find_platform)}
case $PLATFORM in
    npu)
        set +euo pipefail # CANN's scripts expect a shell without
        for settings in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do
            # The CANN that the caller sourced, wherever it is, stays.
            if [[ -z ${ASCEND_HOME_PATH:-} && -f $settings ]]; then
                # shellcheck disable=SC1090
                source "$settings"
            fi
        done
        if [[ -z ${ATB_HOME_PATH:-} && -f /usr/local/Ascend/nnal/atb/set_env.sh ]]; then
            # shellcheck disable=SC1091
            source /usr/local/Ascend/nnal/atb/set_env.sh
        fi
        set -euo pipefail
        if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
            cann="no CANN: expected set_env.sh in /usr/local/Ascend/cann or ascend-toolkit, or its variables set already"
            [[ ${DRY_RUN:-0} == 1 ]] || fail "$cann"
            echo "note: $cann" >&2
        fi
        # docs/ascend.md explains each variable.
        export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-3600}
        export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-3600}
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
        [[ -n ${PYTORCH_ALLOC_CONF:-} ]] || # newer torch_npu refuses to start with both
            export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
        export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
        export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
        ;;
    cuda)
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
        ;;
    cpu)
        # OpenMP threads that spin slow each other down when several ranks share a few cores.
        export GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        ;;
    *) fail "PLATFORM=$PLATFORM is none of npu, cuda, cpu" ;;
esac
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is local
ACTIVE=${VIRTUAL_ENV:-} # an environment that the caller chose; conda activates "base" by itself
[[ ${CONDA_DEFAULT_ENV:-base} == base ]] || ACTIVE=${CONDA_PREFIX:-}
if [[ -d .venv/bin && -z $ACTIVE ]]; then # made by `make setup`
    export PATH=$PWD/.venv/bin:$PATH
fi
command -v python >/dev/null || fail "no python on PATH: activate the environment of docs/ascend.md (Install), or run make setup"

# ---------------------------------------------------------------- layout
NPUS_PER_NODE=${NPUS_PER_NODE:-$((TP * PP))}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
if [[ -z ${MASTER_PORT:-} ]]; then # all nodes must name the same one
    if ((NNODES == 1)); then MASTER_PORT=$(free_port); else MASTER_PORT=6000; fi
fi
((NPUS_PER_NODE * NNODES % (TP * PP) == 0)) ||
    fail "NPUS_PER_NODE=$NPUS_PER_NODE x NNODES=$NNODES processes are no multiple of TP=$TP x PP=$PP"
LAYOUT=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --platform "$PLATFORM"
    --distributed-timeout-minutes 70 # longer than HCCL's own, whose errors and log say more
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi

# ---------------------------------------------------------------- paths
MODEL_SIZE=${MODEL_SIZE:-full}
case $MODEL_SIZE in
    full | random) SEQ_LENGTH=${SEQ_LENGTH:-4096} ;;
    tiny) SEQ_LENGTH=${SEQ_LENGTH:-256} ;;
    *) fail "MODEL_SIZE=$MODEL_SIZE is none of full, random, tiny" ;;
esac
RUN_DIR=${RUN_DIR:-runs/qwen3-$QWEN3}
[[ $MODEL_SIZE == full ]] || HF_DIR=${HF_DIR:-$RUN_DIR/$MODEL_SIZE/hf}
HF_DIR=${HF_DIR:-Qwen3-${QWEN3^^}}
TOKENIZER_PATH=${TOKENIZER_PATH:-$HF_DIR}
MCORE_DIR=$RUN_DIR/mcore # written by ckpt_convert_..._hf2mcore.sh
MODEL_DIR=$HF_DIR        # the stages read either of the two
if [[ -d $MCORE_DIR ]]; then MODEL_DIR=$MCORE_DIR; fi
DATA_PATH=${DATA_PATH:-$RUN_DIR/corpus}
STORE_DIR=${STORE_DIR:-$RUN_DIR/store}
LOG_DIR=${LOG_DIR:-$RUN_DIR/logs}
if [[ $MODEL_SIZE != full ]]; then
    TINY=${TINY:-$RUN_DIR/$MODEL_SIZE/data}
    INPUT_FILE=${INPUT_FILE:-$TINY/domain_train.jsonl}
    SQL_DIR=${SQL_DIR:-$TINY/domain_test}
    GENERAL_TEXT=${GENERAL_TEXT:-$TINY/general_heldout.jsonl}
    TASK_DATA=${TASK_DATA:-$TINY/domain_test/questions.jsonl}
fi

# ---------------------------------------------------------------- launch
show() { # show COMMAND...: print it, quoted for a shell
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

run() { # run COMMAND...: print, run and log it; DRY_RUN=1 only prints
    show "$@"
    [[ ${DRY_RUN:-0} != 1 ]] || return 0
    mkdir -p "$LOG_DIR"
    # tee ignores interrupts, so that it still logs what the command prints while it saves.
    "$@" 2>&1 | tee -ai "$LOG_DIR/$SCRIPT.node$NODE_RANK.log"
}

launch() { # launch MODULE FLAGS...: on every device of this node, or on none with --dry-run
    local module=$1 flag
    shift
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
        python -m "$module" --help
        return
    fi
    [[ ${DRY_RUN:-0} == 1 || -d ${CKPT_LOAD_DIR:-$MODEL_DIR} ]] ||
        fail "${CKPT_LOAD_DIR:-$MODEL_DIR}: no such directory; set HF_DIR to the Hugging Face checkpoint, or CKPT_LOAD_DIR"
    for flag in "$@"; do
        if [[ $flag == --dry-run || $flag == --print-config ]]; then
            run env WORLD_SIZE=$((NPUS_PER_NODE * NNODES)) python -m "$module" "$@"
            return
        fi
    done
    if [[ ${DRY_RUN:-0} != 1 && $NODE_RANK == 0 ]] && (: <"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; then
        fail "MASTER_PORT=$MASTER_PORT: another program listens there; choose another port, the same on all nodes"
    fi
    run torchrun --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m "$module" "$@"
}

made_inputs() { # with MODEL_SIZE=tiny or random, make the data and, once, the checkpoint
    [[ $MODEL_SIZE != full ]] || return 0
    [[ -d $TINY ]] || run python -m examples.quickstart.make_data --output "$TINY" \
        --train 96 --test 8 --general 8
    [[ -f $HF_DIR/config.json ]] || run python -m examples.quickstart.init_base \
        --shape "qwen3-$QWEN3-$MODEL_SIZE" --output "$HF_DIR"
}

# ---------------------------------------------------------------- steps, in the order the data flows
convert_to_mcore() { # Hugging Face -> a checkpoint that loads into any layout
    made_inputs
    run python tools/convert_checkpoint.py --load-model-type hf --save-model-type mcore \
        --load-dir "$HF_DIR" --save-dir "${CKPT_SAVE_DIR:-$MCORE_DIR}" "$@"
}

convert_to_mg() { # Hugging Face -> one file per rank, for MindSpeed-LLM
    made_inputs
    run python tools/convert_checkpoint.py --load-model-type hf --save-model-type mg \
        --load-dir "$HF_DIR" --save-dir "${CKPT_SAVE_DIR:-$RUN_DIR/mg}" \
        --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" "$@"
}

convert_data() { # rows -> corpus $DATA_PATH.{bin,idx,loss_mask,json}; only answers carry loss
    made_inputs
    [[ -n ${INPUT_FILE:-} ]] || fail "INPUT_FILE is not set: a JSON-lines file of prompt/completion, alpaca, sharegpt or messages rows"
    run python tools/preprocess_data.py --input "$INPUT_FILE" --tokenizer "$TOKENIZER_PATH" \
        --output-prefix "$DATA_PATH" --show 2 "$@"
}

STAGES=( # flags that both stages take
    --data-path "$DATA_PATH"
    --store "$STORE_DIR" # a baseline reads it only for the probe
    --seq-length "$SEQ_LENGTH"
    --micro-batch-size "${MBS:-1}"
    --long-documents "${LONG_DOCUMENTS:-error}"
    --bf16
    "${LAYOUT[@]}"
)

stage0() { # corpus -> candidate store, once for all runs of Stage 1
    launch megatron_replay.stage0 --load "${CKPT_LOAD_DIR:-$MODEL_DIR}" "${STAGES[@]}" \
        --coverage 0.95 --max-candidates 200 --position-strategy bucket --position-fraction 0.5 "$@"
}

OPTIMIZER=${OPTIMIZER:-moclip}

stage1() { # corpus and store -> checkpoints in $RUN_DIR/$OPTIMIZER
    local training=(
        --optimizer "$OPTIMIZER"
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
    case $OPTIMIZER in
        moclip) training+=(--loss restricted --max-angle 45) ;;
        mofo) training+=(--loss full --mofo-fraction 0.2) ;;
        *) training+=(--loss full) ;;
    esac
    launch megatron_replay.stage1 --load "${CKPT_LOAD_DIR:-$MODEL_DIR}" \
        --save "${CKPT_SAVE_DIR:-$RUN_DIR/$OPTIMIZER}" "${STAGES[@]}" "${training[@]}" "$@"
}

convert_to_hf() { # a run of Stage 1 -> Hugging Face, by default in export/ inside the run
    local run_dir=${CKPT_LOAD_DIR:-$RUN_DIR/$OPTIMIZER}
    run python tools/convert_checkpoint.py --load-model-type mcore --save-model-type hf \
        --load-dir "$run_dir" --save-dir "${CKPT_SAVE_DIR:-$run_dir/export}" \
        --params-dtype bfloat16 "$@"
}

evaluate() { # base and exported runs -> evaluation.json; measures what the variables name
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
