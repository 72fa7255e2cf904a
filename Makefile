# Each target works on a fresh machine and makes the environment that it needs.

PYTHON ?= python3
BIN := .venv/bin
CODE := train_dreambooth_sd3.py train_dreambooth_lora_sd3.py tests demo benchmarks
CORES ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
OLDEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(CORES) -m oldest

# What Python has compiled for one process serves the next, which then starts much sooner.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-gpu test-oldest test-2025 test-newest golden check format

help: ## this list
	@sed -n 's/^\([a-z][^:]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "make %-24s%s\n", $$1, $$2}'
	@echo "PYTHON=python3.12 names another Python, CORES=1 another number of processes for the tests (here $(CORES))"

demo: .venv/ready ## a small training run to look at
	$(BIN)/python demo/run.py

test: .venv/ready ## all tests, on every core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

test-oldest test-2025: test-%: .venv-%/ready ## the marked tests with the oldest versions of requirements_sd3.txt; with those of the end of 2025
	$(call OLDEST,.venv-$*)

test-newest: .venv-newest/ready ## the marked tests with the newest versions that requirements_sd3.txt allows
	$(call OLDEST,$(<D)) -k 'not test_what_is_installed'

# If losses or the format of checkpoints are meant to change.
golden: .venv/ready ## writes the losses and checkpoints that later versions are compared with
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/support $(BIN)/python tests/support/golden.py

# Uses the first card, or CUDA_VISIBLE_DEVICES. cuBLAS reads its setting only once, before any test could set it.
test-gpu: .venv/ready ## both scripts on a CUDA card against the CPU
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engines/test_gpu.py

check: .venv/ready ## ruff: format, lint, complexity; vulture: dead code; codespell: misspelt words
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/vulture
	$(BIN)/codespell

format: .venv/ready ## lets ruff format the code and fix what it can
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

.venv/ready: constraints.txt requirements_sd3.txt requirements_dev.txt
	$(environment)

.venv-%/ready: constraints-%.txt requirements_sd3.txt requirements_dev.txt
	$(environment)

# Made again each time, because the newest versions change. PIP_EXTRA_INDEX_URL can name an index with PyTorch for CPUs.
.venv-newest/ready: requirements_sd3.txt requirements_dev.txt FORCE
	$(environment)

FORCE:

# Python compiles what it imports: all of it, as pip would, takes longer than the rest of the installation.
define environment
@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11 to 3.14, or name one: make PYTHON=..." >&2; exit 1; }
@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 15) or sys.exit(f"Python 3.11 to 3.14 is needed, $(PYTHON) is {v[0]}.{v[1]}: name another with make PYTHON=...")'
test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install --quiet --no-compile -r requirements_sd3.txt -r requirements_dev.txt $(or $(patsubst %,-c %,$(filter constraints%,$^)),--upgrade)
$(@D)/bin/python -m pip check
@touch $@
endef
