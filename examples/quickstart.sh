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
  --epochs N            passes over the data         (default 1)
  --global-batch-size N packs in one step            (default 4)
  --long-documents P    error, drop or truncate what does not fit (default error)
TEXT
}

OUT="" SEED=0 TP=2 HF_CHECKPOINT="" DATA="" SEQ_LENGTH="" LR="" LONG=error EPOCHS="" GLOBAL_BATCH=""
fail() { echo "error: $*" >&2 && exit 2; }
while (($#)); do
    [[ $1 == -h || $1 == --help ]] && usage && exit 0
    (($# >= 2)) || fail "$1 is unknown or lacks its value; see --help"
    case $1 in
        --output) OUT=$(realpath -m -- "$2") ;; # relative to where the user stands
        --seed) SEED=$2 ;;
        --tp) TP=$2 ;;
        --hf-checkpoint) HF_CHECKPOINT=$(realpath -m -- "$2") ;;
        --data) DATA=$(realpath -m -- "$2") ;;
        --seq-length) SEQ_LENGTH=$2 ;;
        --lr) LR=$2 ;;
        --long-documents) LONG=$2 ;;
        --epochs) EPOCHS=$2 ;;
        --global-batch-size) GLOBAL_BATCH=$2 ;;
        *) fail "unknown option $1; see --help" ;;
    esac
    shift 2
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/quickstart}
CONTENT=""
if [[ -n $HF_CHECKPOINT || -n $DATA ]]; then
    [[ -n $HF_CHECKPOINT && -n $DATA ]] || fail "--hf-checkpoint and --data go together"
    [[ -f $HF_CHECKPOINT/config.json ]] || fail "$HF_CHECKPOINT: no Hugging Face checkpoint here (expected config.json)"
    [[ -f $DATA ]] || fail "$DATA: no such file"
    CONTENT=$(sha256sum <"$DATA" | cut -c1-16)
fi

base_model() { # full loss on general text and some SQL, two data-parallel processes
    launch 2 megatron_replay.stage1 --load "$CACHE/init" --data-path "$CACHE/corpus" \
        --save "$CACHE/train" --loss full --optimizer adamw --seq-length 128 \
        --micro-batch-size 8 --global-batch-size 16 --train-iters 800 \
        --lr 4e-3 --min-lr 4e-5 --lr-decay-style linear --lr-warmup-iters 50 \
        --weight-decay 0.1 --save-interval 200 &&
        "$PYTHON" tools/convert_checkpoint.py --load "$CACHE/train" --save "$CACHE/hf"
}

# Spinning OpenMP threads of several ranks on few cores slow each other down several times.
export GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is local

make --silent setup
PYTHON=.venv/bin/python
mkdir -p "$OUT"
TIMINGS=$OUT/timings.txt # a line a part; a part run again comes last and counts
STARTED=$SECONDS

# One output directory holds one experiment: other settings need another directory.
SETTINGS="seed=$SEED tp=$TP hf_checkpoint=$HF_CHECKPOINT data=$DATA $CONTENT seq_length=$SEQ_LENGTH \
lr=$LR long=$LONG epochs=$EPOCHS global_batch=$GLOBAL_BATCH"
if [[ -f $OUT/settings && $(<"$OUT/settings") != "$SETTINGS" ]]; then
    echo "error: $OUT holds a run with other settings ($(<"$OUT/settings")); give another --output" >&2
    exit 2
fi
echo "$SETTINGS" >"$OUT/settings"

part() { # part PRODUCT NAME COMMAND...: unless PRODUCT exists, run COMMAND and note how long it took
    # A function called with || runs without set -e: those below chain their commands with &&.
    local product=$1 name=$2 start status=0
    shift 2
    if [[ -e $product ]]; then
        echo "== $name: reused ($product)"
        return
    fi
    echo "== $name"
    start=$(date +%s%N)
    "$@" || status=$?
    if ((status)); then
        echo "== $name stopped (exit code $status); run the same command again to go on" >&2
        exit "$status"
    fi
    local milliseconds=$((($(date +%s%N) - start) / 1000000))
    printf '== %s: %d.%03d s\n' "$name" $((milliseconds / 1000)) $((milliseconds % 1000))
    printf '"%s": %d.%03d\n' \
        "$name" $((milliseconds / 1000)) $((milliseconds % 1000)) >>"$TIMINGS"
}

launch() { # launch PROCESSES MODULE FLAGS...
    local processes=$1
    shift
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m "$@"
}

preprocess() { # preprocess PREFIX FLAGS...
    local prefix=$1
    shift
    "$PYTHON" tools/preprocess_data.py --output-prefix "$prefix" "${STYLE[@]}" "$@"
}

# ---------------------------------------------------------------- base model and domain data
if [[ -z $HF_CHECKPOINT ]]; then
    CACHE=runs/quickstart-base # made once, used by every --output and --seed
    BASE=$CACHE/hf TOKENIZER=$CACHE/data/tokenizer DATA=$CACHE/data
    SEQ_LENGTH=${SEQ_LENGTH:-512} LR=${LR:-2e-4} MICRO_BATCH=2 WARMUP=10
    GLOBAL_BATCH=${GLOBAL_BATCH:-2} EPOCHS=${EPOCHS:-2}
    STYLE=(--no-chat-template) # this base model has read plain text only
    part "$DATA/domain_test/questions.jsonl" "data" \
        "$PYTHON" -m examples.quickstart.make_data --output "$DATA"
    part "$CACHE/corpus.json" "base: corpus" \
        preprocess "$CACHE/corpus" --input "$DATA/base_train.jsonl" --tokenizer "$TOKENIZER" \
        --max-document-tokens 129
    part "$CACHE/init/config.json" "base: random weights" \
        "$PYTHON" examples/quickstart/init_base.py --tokenizer "$TOKENIZER" --output "$CACHE/init"
    part "$CACHE/hf/config.json" "base: training, DP 2" base_model
    TRAIN_ROWS=$DATA/domain_train.jsonl
    EVALUATE=(--sql "tables=$DATA/domain_test" --data "$DATA/domain_test/questions.jsonl"
        --general-text "$DATA/general_heldout.jsonl")
else
    BASE=$HF_CHECKPOINT TOKENIZER=$HF_CHECKPOINT
    SEQ_LENGTH=${SEQ_LENGTH:-1024} LR=${LR:-1e-5} MICRO_BATCH=1 WARMUP=0
    GLOBAL_BATCH=${GLOBAL_BATCH:-4} EPOCHS=${EPOCHS:-1}
    STYLE=() # the chat template, if the tokenizer has one
    part "$OUT/data/train.jsonl" "data: hold out every tenth row" \
        "$PYTHON" -m examples.quickstart.split_data --input "$DATA" --output "$OUT/data"
    TRAIN_ROWS=$OUT/data/train.jsonl
    EVALUATE=(--data "$OUT/data/heldout.jsonl" --general-text "$OUT/data/general_heldout.jsonl")
fi
part "$OUT/corpus.json" "corpus" \
    preprocess "$OUT/corpus" --input "$TRAIN_ROWS" --tokenizer "$TOKENIZER" --show 2

# ---------------------------------------------------------------- Stage 0: once
COMMON=(--data-path "$OUT/corpus" --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH"
    --tensor-model-parallel-size "$TP" --long-documents "$LONG")
part "$OUT/store/manifest.json" "Stage 0, TP $TP" \
    launch "$TP" megatron_replay.stage0 --load "$BASE" --store "$OUT/store" "${COMMON[@]}" \
    --position-strategy all --documents-per-shard 256

# ---------------------------------------------------------------- Stage 1: four ways
train() { # train ARM FLAGS...: to the end, then export
    local arm=$1
    shift
    launch "$TP" megatron_replay.stage1 --load "$BASE" --store "$OUT/store" "${COMMON[@]}" \
        --save "$OUT/$arm" --seed "$SEED" --global-batch-size "$GLOBAL_BATCH" \
        --train-epochs "$EPOCHS" --lr-decay-style linear --lr-warmup-iters "$WARMUP" --weight-decay 0.0 \
        --save-interval 50 --probe-interval 40 --probe-documents 64 "$@" &&
        # transformers loads every export below, to evaluate it; no need to load it here as well
        "$PYTHON" tools/convert_checkpoint.py --load "$OUT/$arm" --save "$OUT/$arm/export" \
            --overwrite --no-verify
}

part "$OUT/adamw/export" "Stage 1: AdamW, full softmax" \
    train adamw --loss full --optimizer adamw --lr "$LR"
part "$OUT/replay-moclip/export" "Stage 1: replay + MoClip" \
    train replay-moclip --loss restricted --optimizer moclip --lr "$LR"
part "$OUT/replay-document/export" "Stage 1: replay, document scope + ghost" \
    train replay-document --loss restricted --candidate-scope document --tail ghost \
    --optimizer adamw --lr "$LR"
MATCHED_LR=$("$PYTHON" examples/quickstart/match_learning_rate.py --base "$BASE" --lr "$LR" \
    --moved "$OUT/adamw/export" --target "$OUT/replay-moclip/export")
part "$OUT/adamw-matched/export" "Stage 1: AdamW, moving as little as replay + MoClip" \
    train adamw-matched --loss full --optimizer adamw --lr "$MATCHED_LR"

# ---------------------------------------------------------------- what was gained, kept, paid
ARMS=(adamw adamw-matched replay-moclip replay-document)
MODELS=() RUNS=()
for arm in "${ARMS[@]}"; do
    MODELS+=(--model "$arm=$OUT/$arm/export") RUNS+=(--run "$arm=$OUT/$arm")
done
part "$OUT/evaluation.json" "evaluation" \
    env OMP_NUM_THREADS="$(nproc)" "$PYTHON" tools/evaluate.py --base "$BASE" "${MODELS[@]}" "${EVALUATE[@]}" "${STYLE[@]}" \
    --data-path "$OUT/corpus" --store "$OUT/store" --output "$OUT/evaluation.json"
printf '{%s}\n' "$(paste -sd, "$TIMINGS")" >"$OUT/timings.json"
part "$OUT/report.png" "report" \
    "$PYTHON" tools/report.py --evaluation "$OUT/evaluation.json" "${RUNS[@]}" \
    --timings "$OUT/timings.json" --output-dir "$OUT"
cat "$OUT/report.md"
echo "done in $((SECONDS - STARTED)) s: $OUT/report.md, report.json, report.png"
