# The commands of this project. Each one sets up what it needs.
# The interpreter of .venv, 3.10 to 3.13: make setup PYTHON=python3.12
PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)
BIN := .venv/bin
STAMP := .venv/.ready
PEERS := .venv/.peers
BUILD_KERNELS := $(or $(MEGATRON_REPLAY_BUILD_KERNELS),1)

# Without the cache that this forbids, each process compiles the Python of torch, for 15 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test mutation check bench bench-optim bench-head bench-select bench-store bench-stage0 bench-stage1 bench-prefix study clean

setup: $(STAMP)  ## create .venv with pinned packages and this package in place

VERSION = -c 'import sys; print("%d.%d" % sys.version_info[:2])'

# Without PYTHON, the .venv that is there stays.
.PHONY: interpreter
interpreter:
ifneq ($(origin PYTHON),file)
	@! test -e $(BIN)/python || test "$$($(PYTHON) $(VERSION))" = "$$($(BIN)/python $(VERSION))" || \
		{ echo "error: .venv is of Python $$($(BIN)/python $(VERSION)), not of $(PYTHON); run make clean first" >&2; exit 1; }
endif

$(STAMP): requirements/cpu.txt setup.py \
		$(wildcard csrc/cpu/*.cpp csrc/cpu/*.h csrc/store/*.cpp csrc/ascend/*.* csrc/ascend/*/*.*) | interpreter
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: Python 3.10 to 3.13 is needed, found $$($(PYTHON) --version 2>&1); choose one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "error: the venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@test $(BUILD_KERNELS) = 0 || command -v $(CXX) >/dev/null || \
		{ echo "error: no C++ compiler ($(CXX)); on Debian: apt-get install g++; or set MEGATRON_REPLAY_BUILD_KERNELS=0 to install without compiled kernels" >&2; exit 1; }
	@echo "installing the pinned packages into .venv; takes a minute or more"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

test: setup  ## all tests in two processes, those of one process first
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

mutation: setup  ## bugs put into the AscendC kernels: the emulator must find each (1 minute)
	$(BIN)/python -m pytest tests/ascemu/mutations.py

check: setup  ## style, types, shell scripts, Dockerfiles, layer laws
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $$(git ls-files '*.sh')
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/python -m pytest tests/test_laws.py

$(PEERS): $(STAMP) requirements/bench.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements/bench.txt
	@touch $@

bench: bench-optim bench-head bench-select bench-store bench-stage0 bench-stage1 bench-prefix  ## all of them, each beside its peers

bench-optim: $(PEERS)  ## the optimizer's step: ns and bytes per parameter
	$(BIN)/python -m benchmarks.optim

bench-head: $(PEERS)  ## the restricted head, forward and backward, at 152k vocabulary
	$(BIN)/python -m benchmarks.head

bench-select: $(PEERS)  ## choosing candidates, beside the output layer that it follows
	$(BIN)/python -m benchmarks.select

bench-store: $(PEERS)  ## the store: ids read a second, bytes a position, and what a batch takes
	$(BIN)/python -m benchmarks.store

bench-stage0: $(PEERS)  ## Stage 0 beside a plain forward pass of the same model
	$(BIN)/python -m benchmarks.stage0

bench-stage1: $(PEERS)  ## what each exact saving of Stage 1 buys, beside transformers
	$(BIN)/python -m benchmarks.stage1

bench-prefix: $(PEERS)  ## what shared prefixes save; on Spider: python -m benchmarks.prefix --data DIR --tokenizer DIR
	$(BIN)/python -m benchmarks.prefix

PLAN ?= quick
BASE ?= runs/smollm2
STUDY = runs/study-$(PLAN)

study: setup  ## the methods on a real model and real data: make study DATA=DIR [PLAN=quick | small | whole] [BASE=DIR]
	@test -d "$(DATA)" || { echo "error: DATA=DIR is missing: a folder for each published set, see examples/replicate/README.md" >&2; exit 1; }
	@test -e $(BASE) || test $(BASE) = runs/smollm2 || { echo "error: BASE=$(BASE): no such directory" >&2; exit 1; }
	test -e $(BASE) || $(BIN)/python -m examples.quickstart.smollm2 --output $(BASE)
	$(BIN)/python -m examples.replicate.run --plan $(PLAN) --data $(DATA) --base $(BASE) --output $(STUDY)
	$(BIN)/python -m examples.replicate.report --rows $(STUDY)/rows.csv --output-dir $(STUDY)/report

clean:
	rm -rf .venv build megatron_replay/*/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
