# Sourced by every script of this folder: strict mode, platform, environment, places, launch.
#
# A script sets QWEN3 (4b or 8b), TP and PP before it sources this. Everything below may be set from
# outside; paths are relative to where you stand.
#
#   PLATFORM        npu, cuda or cpu (found out when unset)
#   NPUS_PER_NODE   processes of this node (TP x PP x DP / NNODES)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT      as torchrun's
#   HF_DIR          the Hugging Face checkpoint all starts from
#   TOKENIZER_PATH  its tokenizer, or a sentencepiece model
#   INPUT_FILE      your rows (README.md has the formats)
#   RUN_DIR         where everything goes that has no name of its own
#   DATA_PATH       prefix of the corpus; STORE_DIR the candidate store
#   CKPT_LOAD_DIR CKPT_SAVE_DIR   what a script reads and writes
#   DRY_RUN=1       print the commands and run none
#   MODEL_SIZE=tiny a model of Qwen3's proportions that a CPU trains in seconds, with its own data
#
# Flags behind a script's name go to its command last: stage1_... --lr 1e-6 --dry-run
# shellcheck shell=bash disable=SC2034  # scripts use what is set here
set -euo pipefail

absolute() { # absolute NAME...: the variables that are set
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
        for settings in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do
            if [[ -f $settings ]]; then
                # shellcheck disable=SC1090
                set +u && source "$settings" && set -u # it reads variables that need not be set
                break
            fi
        done
        if [[ -z ${ASCEND_HOME_PATH:-} ]]; then
            cann="no CANN: expected set_env.sh in /usr/local/Ascend/cann or ascend-toolkit, or its variables set already"
            [[ ${DRY_RUN:-0} == 1 ]] || fail "$cann"
            echo "note: $cann" >&2 # what would be run can be shown anywhere
        fi
        if [[ -f /usr/local/Ascend/nnal/atb/set_env.sh ]]; then
            # shellcheck disable=SC1091
            set +u && source /usr/local/Ascend/nnal/atb/set_env.sh && set -u
        fi
        # docs/ascend.md says what each is for.
        export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-3600}
        export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-3600}
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
        export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
        export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
        export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
        ;;
    cuda)
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
        ;;
    cpu)
        # Spinning OpenMP threads of several ranks on few cores slow each other down several times.
        export GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        ;;
    *) fail "PLATFORM=$PLATFORM is none of npu, cuda, cpu" ;;
esac
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is local
if [[ -d .venv/bin && -z ${VIRTUAL_ENV:-} ]]; then # made by `make setup`
    export PATH=$PWD/.venv/bin:$PATH
fi

# ---------------------------------------------------------------- layout
NPUS_PER_NODE=${NPUS_PER_NODE:-$((TP * PP))}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
((NPUS_PER_NODE * NNODES % (TP * PP) == 0)) ||
    fail "NPUS_PER_NODE=$NPUS_PER_NODE x NNODES=$NNODES processes are no multiple of TP=$TP x PP=$PP"
LAYOUT=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --platform "$PLATFORM"
    --distributed-timeout-minutes 60
)
if ((TP > 1)); then LAYOUT+=(--sequence-parallel); fi

# ---------------------------------------------------------------- places
MODEL_SIZE=${MODEL_SIZE:-full}
case $MODEL_SIZE in
    full) SEQ_LENGTH=${SEQ_LENGTH:-4096} ;;
    tiny) SEQ_LENGTH=${SEQ_LENGTH:-256} ;;
    *) fail "MODEL_SIZE=$MODEL_SIZE is neither full nor tiny" ;;
esac
RUN_DIR=${RUN_DIR:-runs/qwen3-$QWEN3}
[[ $MODEL_SIZE == full ]] || HF_DIR=${HF_DIR:-$RUN_DIR/tiny/hf}
HF_DIR=${HF_DIR:-Qwen3-${QWEN3^^}}
TOKENIZER_PATH=${TOKENIZER_PATH:-$HF_DIR}
MCORE_DIR=$RUN_DIR/mcore # what ckpt_convert_..._hf2mcore.sh writes
MODEL_DIR=$HF_DIR        # what the stages start from; they read a Hugging Face directory as well
if [[ -d $MCORE_DIR ]]; then MODEL_DIR=$MCORE_DIR; fi
DATA_PATH=${DATA_PATH:-$RUN_DIR/corpus}
STORE_DIR=${STORE_DIR:-$RUN_DIR/store}
LOG_DIR=${LOG_DIR:-$RUN_DIR/logs}
if [[ $MODEL_SIZE == tiny ]]; then
    TINY=${TINY:-$RUN_DIR/tiny/data}
    INPUT_FILE=${INPUT_FILE:-$TINY/domain_train.jsonl}
    SQL_DIR=${SQL_DIR:-$TINY/domain_test}
    GENERAL_TEXT=${GENERAL_TEXT:-$TINY/general_heldout.jsonl}
    TASK_DATA=${TASK_DATA:-$TINY/domain_test/questions.jsonl}
fi

# ---------------------------------------------------------------- doing
show() { # show COMMAND...: quoted, so that it can be pasted
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

run() { # run COMMAND...: shown, logged, its exit code kept; only shown under DRY_RUN=1
    show "$@"
    [[ ${DRY_RUN:-0} != 1 ]] || return 0
    mkdir -p "$LOG_DIR"
    # Interrupts are the command's: it saves, and says so, before tee may go.
    "$@" 2>&1 | tee -ai "$LOG_DIR/$SCRIPT.node$NODE_RANK.log"
}

launch() { # launch MODULE FLAGS...: on every device of this node; with --dry-run, on none
    local module=$1 flag
    shift
    [[ ${DRY_RUN:-0} == 1 || -d ${CKPT_LOAD_DIR:-$MODEL_DIR} ]] ||
        fail "${CKPT_LOAD_DIR:-$MODEL_DIR}: no such directory; set HF_DIR to the Hugging Face checkpoint, or CKPT_LOAD_DIR"
    for flag in "$@"; do
        if [[ $flag == --dry-run || $flag == --print-config ]]; then
            run env WORLD_SIZE=$((NPUS_PER_NODE * NNODES)) python -m "$module" "$@"
            return
        fi
    done
    run torchrun --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m "$module" "$@"
}

tiny_inputs() { # MODEL_SIZE=tiny: make the data and the checkpoint, unless they are there
    [[ $MODEL_SIZE == tiny ]] || return 0
    run python -m examples.quickstart.make_data --output "$TINY" --base-questions 500 \
        --practice-tables 20 --domain-train 96 --domain-test 8 --general-train 200 --general-heldout 8
    [[ -f $HF_DIR/config.json ]] || run python examples/quickstart/init_base.py \
        --shape "qwen3-$QWEN3" --tokenizer "$TINY/tokenizer" --output "$HF_DIR"
}

# shellcheck source=examples/qwen3/steps.sh
source examples/qwen3/steps.sh
