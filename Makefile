# make demo, make test, make check and make format work on a fresh machine: each makes the environment it needs.

PYTHON ?= python3
BIN := .venv/bin
CODE := train_dreambooth_sd3.py train_dreambooth_lora_sd3.py tests demo benchmarks

.PHONY: demo test test-gpu test-oldest test-2025 golden check format

demo: .venv/ready
	$(BIN)/python demo/run.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# With the oldest versions that requirements_sd3.txt allows, and with those of the end of 2025.
test-oldest test-2025: test-%: .venv-%/ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 -m oldest

# Writes the losses and checkpoints that later versions are held against, where a change of them is meant.
golden: .venv/ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/support/golden.py

# On the first card, or on the one that CUDA_VISIBLE_DEVICES names. cuBLAS reads its setting once, before a test asks.
test-gpu: .venv/ready
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engines/test_gpu.py

check: .venv/ready
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/vulture
	$(BIN)/codespell

format: .venv/ready
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

.venv/ready: constraints.txt requirements_sd3.txt requirements_dev.txt
	$(environment)

.venv-%/ready: constraints-%.txt requirements_sd3.txt requirements_dev.txt
	$(environment)

define environment
@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11 to 3.14, or name one: make PYTHON=..." >&2; exit 1; }
@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 15) or sys.exit(f"Python 3.11 to 3.14 is needed, $(PYTHON) is {v[0]}.{v[1]}: name another with make PYTHON=...")'
test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install --quiet -r requirements_sd3.txt -r requirements_dev.txt -c $<
$(@D)/bin/python -m pip check
@touch $@
endef
