# The doors of the house. Each one sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: setup test check bench clean

setup: $(STAMP)  ## create .venv with pinned packages and this package in place

$(STAMP): requirements/cpu.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: the pinned packages are for Python 3.11, found $$($(PYTHON) --version); name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "error: the venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

test: setup  ## all tests, those of one process first
	$(BIN)/python -m pytest --durations=15

check: setup  ## style, types, shell scripts, layer laws
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $$(git ls-files '*.sh')
	$(BIN)/python -m pytest tests/test_laws.py

bench: setup  ## nothing is measured yet: the kernels and their benchmarks come with csrc/
	@echo "no benchmarks yet"

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
