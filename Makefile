# What a newcomer types: `make demo` and `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Several processes share the cores: each computes on one thread.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test slurm test-slow test-latest lint format docs wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         real text -> tokenizer -> shards -> two trained models -> a plot and a sample"
	@echo "make test         all tests, on the default Python"
	@echo "make test-slow    what compiles DeepSpeed operators first: minutes, and needs g++"
	@echo "make test-latest  the layout matrix on Python 3.12 with the newest Megatron-core, where there is one"
	@echo "make install      the environment alone, in .venv"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff format the code"
	@echo "make docs         generate docs/config.md and the table of docs/layouts.md"
	@echo "make wheel        build dist/*.whl"
	@echo "make clean        remove what the targets above made, environments included"

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing llmscale and what it needs into .venv: some minutes, the first time"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install slurm
	$(BIN)/python -m pytest tests --durations=10 -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# A real Slurm for tests/slurm, on this machine's loopback. Where it may not be installed, these tests skip and say why.
slurm:
	@for program in slurmctld slurmd munged sbatch; do command -v $$program >/dev/null || missing=yes; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Slurm for its tests"; \
		{ timeout 120 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y \
			--no-install-recommends slurmctld slurmd slurm-client munge; } >/dev/null 2>&1 \
			|| echo "it cannot be installed here"; \
	fi

test-slow: install
	$(BIN)/python -m pytest tests -m slow

# A Python 3.12 on the PATH, or the newest of pyenv's, which runs by its own path even where it is not selected.
ifneq (,$(filter test-latest,$(MAKECMDGOALS)))
PYTHON312 := $(shell \
	for candidate in python3.12 $$(ls -d "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python3.12 2>/dev/null | sort -rV); do \
		if "$$candidate" -c '' >/dev/null 2>&1; then echo "$$candidate"; break; fi; \
	done)
endif

ifneq (,$(PYTHON312))
test-latest: .venv312/.installed
	.venv312/bin/python -m pytest tests/distributed/test_matrix.py -k "zero1 or zero3 or bf16" --durations=10 -n 2
else
test-latest:
	@echo "test-latest: skipped: no Python 3.12 here (looked for python3.12 on the PATH and in pyenv);" \
		"Megatron-core 0.17 and later need it"
endif

.venv312/.installed: pyproject.toml constraints.txt
	test -x .venv312/bin/python || $(PYTHON312) -m venv .venv312
	@echo "installing llmscale and what it needs into .venv312: some minutes and gigabytes, the first time"
	.venv312/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m tests.unit.test_docs

wheel: install
	$(BIN)/python -m hatchling build -t wheel

clean:
	rm -rf .venv .venv312 build dist demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
