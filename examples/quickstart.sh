#!/usr/bin/env bash
# The whole method on this machine, without downloads: a small Qwen3 base model, its domain data,
# Stage 0, four ways through Stage 1, export, evaluation, report.
#
#   bash examples/quickstart.sh                                   # everything made here
#   bash examples/quickstart.sh --hf-checkpoint DIR --data FILE.jsonl   # with your own
#
# Run it again after Ctrl-C: finished parts are kept, unfinished ones go on where they stopped.
# Results: runs/quickstart/report.md, report.json, report.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash examples/quickstart.sh [options]
  --output DIR          where everything goes        (default runs/quickstart)
  --seed N              seed of data order and draws (default 0)
with your own model and data:
  --hf-checkpoint DIR   Qwen3 in Hugging Face format
  --data FILE.jsonl     prompt/completion, alpaca, sharegpt or messages rows
  --tp N                tensor parallel size         (default 2)
  --seq-length N        positions in a pack          (default 1024)
  --lr X                learning rate of AdamW       (default 1e-5)
TEXT
}

OUT=runs/quickstart SEED=0 TP=2 HF_CHECKPOINT="" DATA="" SEQ_LENGTH="" LR=""
while (($#)); do
    case $1 in
        --output) OUT=$2 ;;
        --seed) SEED=$2 ;;
        --tp) TP=$2 ;;
        --hf-checkpoint) HF_CHECKPOINT=$2 ;;
        --data) DATA=$2 ;;
        --seq-length) SEQ_LENGTH=$2 ;;
        --lr) LR=$2 ;;
        -h | --help) usage && exit 0 ;;
        *) echo "error: unknown option $1" >&2 && usage >&2 && exit 2 ;;
    esac
    shift 2 || { echo "error: the last option lacks its value" >&2 && exit 2; }
done
if [[ -n $HF_CHECKPOINT && -z $DATA || -z $HF_CHECKPOINT && -n $DATA ]]; then
    echo "error: --hf-checkpoint and --data go together" >&2 && exit 2
fi

# Spinning OpenMP threads of several ranks on few cores slow each other down several times.
export GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
# No hub: everything is local. PyTorch's launcher warns of OMP_NUM_THREADS unless it is set.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

make --silent setup
PYTHON=.venv/bin/python
mkdir -p "$OUT"
TIMINGS=$OUT/timings.jsonl

part() { # part NAME COMMAND...: run, time, and keep the time of the last full run
    local name=$1 start status=0
    shift
    printf '\n== %s\n' "$name"
    start=$(date +%s.%N)
    "$@" || status=$?
    ((status == 0)) || { echo "== $name failed (exit code $status)" >&2 && exit "$status"; }
    "$PYTHON" - "$TIMINGS" "$name" "$start" <<'PY'
import json, sys, time
path, name, start = sys.argv[1:]
seconds = time.time() - float(start)
print(f"   {name}: {seconds:.1f} s")
with open(path, "a") as file:
    file.write(json.dumps({"part": name, "seconds": round(seconds, 1)}) + "\n")
PY
}

launch() { # launch PROCESSES MODULE FLAGS...
    local processes=$1
    shift
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m "$@"
}

export_arm() { # export_arm NAME: the newest checkpoint of an arm as a Hugging Face directory
    "$PYTHON" tools/convert_checkpoint.py --load "$OUT/$1/train" --save "$OUT/$1/hf" --skip-existing
}
