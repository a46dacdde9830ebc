#!/usr/bin/env bash
# The first run on a new node, after Install of docs/ascend.md: checks the node, builds the kernels,
# compares layers with the CPU's, then runs both stages in the real layout on random weights of the
# true shape, and packs the logs.
#
#   bash examples/qwen3/first_run.sh             # Qwen3-4B, TP 4, four devices
#   QWEN3=8b bash examples/qwen3/first_run.sh    # Qwen3-8B, TP 4 x PP 2, eight devices
#
# A step that fails does not stop the next ones. Run it again to repeat only what failed. It writes
# into $RUN_DIR/first_run-$QWEN3, by default in runs/: for 4b 120 GB (two checkpoints of 56 GB), for
# 8b 250 GB; remove it afterwards. docs/ascend.md says what is in the archive.
set -euo pipefail
case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "error: $1: first_run.sh takes variables, as in QWEN3=8b bash first_run.sh, and no arguments" >&2 && exit 2 ;;
esac
export QWEN3=${QWEN3:-4b} MODEL_SIZE=${MODEL_SIZE:-random} TP=${TP:-4}
[[ $QWEN3 == 8b ]] && PP=${PP:-2}
export PP=${PP:-1} RUN_DIR=${RUN_DIR:-runs}/first_run-$QWEN3
# It has inputs and outputs of its own, never those of your runs, and this node alone.
unset HF_DIR TOKENIZER_PATH INPUT_FILE DATA_PATH STORE_DIR CKPT_LOAD_DIR CKPT_SAVE_DIR LOG_DIR TINY OPTIMIZER
unset NNODES NODE_RANK MASTER_ADDR NPUS_PER_NODE SEQ_LENGTH GBS MBS
scripts=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
# shellcheck source=examples/qwen3/common.sh
source "$scripts/common.sh"
export PLATFORM RUN_DIR PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the doctor runs before the build
unset MASTER_PORT # each launch takes a free one
[[ $PLATFORM != npu ]] || export ASCEND_PROCESS_LOG_PATH=${ASCEND_PROCESS_LOG_PATH:-$LOG_DIR/cann}

failed=0
step() { # step NAME COMMAND...: run it and keep its output, unless it has succeeded before
    local name=$1 start=$SECONDS result=ok
    shift
    echo "== $name"
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        show "$@"
        return
    fi
    if [[ -e $LOG_DIR/$name.ok ]]; then
        result="ok before"
    elif "$@" 2>&1 | tee -i "$LOG_DIR/$name.log"; then
        touch "$LOG_DIR/$name.ok"
    else
        result=FAILED failed=1
    fi
    printf '%-8s %-10s %6d s\n' "$name" "$result" $((SECONDS - start)) >>"$LOG_DIR/summary.txt"
}

# shellcheck disable=SC2329  # a step
machine() { # what the other logs do not say; npu-smi and git may be absent
    uname -a
    git log -1 --format=%H 2>/dev/null || echo "no git"
    npu-smi info 2>/dev/null || echo "no npu-smi"
    python -m pip list --format freeze
    env | grep -E '^(ASCEND|ATB|CPU_AFF|CUDA|GLOO|HCCL|LD_LIB|NPU|OMP|P2P|PYTHON|PYTORCH|SOC|TASK|TORCH)' | sort
}

# shellcheck disable=SC2329  # a step
build() { # pip shows a line of what CANN's compiler says: the rest is in its log
    local result=0
    python -m pip install --no-build-isolation --no-deps -e . || result=1
    [[ ! -f build/ascend/build.log ]] || cat build/ascend/build.log
    return "$result"
}

if [[ ${DRY_RUN:-0} != 1 ]]; then
    mkdir -p "$LOG_DIR"
    : >"$LOG_DIR/summary.txt"
    needed=120
    [[ $QWEN3 != 8b ]] || needed=250
    free=$(df --output=avail -BG "$RUN_DIR" | tail -n 1 | tr -dc 0-9)
    there=$(du -sBG "$RUN_DIR" | cut -f 1 | tr -dc 0-9) # an earlier try wrote a part of it
    [[ $MODEL_SIZE != random ]] || ((free + there >= needed)) ||
        fail "$RUN_DIR: $free GB are free, and $((needed - there)) are needed; set RUN_DIR to a larger disk"
fi
of_model=qwen3_${QWEN3}_4K
soon=(env HCCL_CONNECT_TIMEOUT=800 HCCL_EXEC_TIMEOUT=800 bash) # before torch's 15 minutes
stage1=("${soon[@]}" "$scripts/stage1_${of_model}_ptd.sh" --train-iters 4 --exit-interval 3
    --global-batch-size 4 --keep-last 1 --distributed-timeout-minutes 15)
step machine machine
step doctor python tools/doctor.py --platform "$PLATFORM" --folder "$RUN_DIR"
step build build
step layers python tools/doctor.py --platform "$PLATFORM" --folder "$RUN_DIR" --compare-gradients
step inputs bash "$scripts/data_convert_${of_model}_instruction.sh"
step stage0 "${soon[@]}" "$scripts/stage0_${of_model}_ptd.sh" --distributed-timeout-minutes 15
step store python tools/inspect_store.py "$STORE_DIR"
step dry_run "${stage1[@]}" --dry-run
step stage1 "${stage1[@]}" # three steps, then a checkpoint
# shellcheck disable=SC2329  # a step
resume() { # from that checkpoint, one step
    [[ -e $LOG_DIR/stage1.ok ]] || fail "stage1 failed, so there is nothing to resume"
    "${stage1[@]}"
}
step resume resume
[[ ${DRY_RUN:-0} != 1 ]] || exit 0

archive=$RUN_DIR/first_run-$QWEN3.tar.gz
(cd "$RUN_DIR" && find logs -type f ! -name '*.ok' &&
    find . -maxdepth 2 \( -name metrics.jsonl -o -name resolved_config.yaml -o -name cost.json \)) |
    tar -C "$RUN_DIR" -czf "$archive" -T -
tar -tzf "$archive"
cat "$LOG_DIR/summary.txt"
echo "$archive: logs and measurements, with paths and this machine's name; no weights and no data of yours"
exit $failed
