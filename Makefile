# Every target works from a fresh clone: it creates .venv and installs llm.py into it first.
# Pass options with ARGS: make train ARGS="--data my.txt --minutes 10". Windows has no make: see README.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PARQUET := .venv/.parquet
PEERS := .venv-peers/.installed
# Files of tests that compare with other programs; a test is skipped if its program is missing.
COMPARING = $(shell grep -lrE '(import|importorskip).*\b(torch|transformers|peft|xllamacpp|llama_cpp|openai|lm_eval)\b' tests --include='test_*.py')

.PHONY: train setup test test-isa test-arm test-mpi test-long test-peers test-wheel fuzz check bench clean

train: $(INSTALLED)
	@$(BIN)/llmpy train $(ARGS)

setup: $(INSTALLED)
	@$(BIN)/llmpy data tinyshakespeare
	@$(BIN)/llmpy sample gpt2 --prompt "The weights are here, and" --tokens 16

# In two processes: with two threads each they fill two cores. For a debugger: ARGS="-n 0 --pdb".
test: $(PARQUET)
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-isa: $(INSTALLED)
	@$(BIN)/python -m pytest -m isa tests/backend/test_isa.py $(ARGS)

test-arm: $(INSTALLED)
	@dev/arm.sh $(ARGS)

test-mpi: $(PARQUET)
	@$(BIN)/python -m pytest -m mpi $(ARGS)

test-long: $(INSTALLED)
	@$(BIN)/python -m pytest -m long $(ARGS)

test-peers: $(PEERS)
	@.venv-peers/bin/python -m pytest -rs $(COMPARING) $(ARGS)

test-wheel: $(INSTALLED)
	@$(BIN)/python dev/check_wheel.py $(ARGS)

fuzz: $(PARQUET)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m fuzz $(ARGS)

check: $(INSTALLED)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python dev/size.py | tail -1

bench: $(INSTALLED)
	@$(BIN)/llmpy bench step $(ARGS)

clean:
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp comes last, so that an interrupted installation is repeated.
$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "llm.py needs Python 3.11 or newer: install it, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llm.py needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: sudo apt install python3-venv), then run make again" >&2; exit 1; }
	@test -w . || { echo "cannot write to $(CURDIR): clone llm.py into a folder of your own" >&2; exit 1; }
	@echo "installing llm.py into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' || { echo "the installation failed: see the lines above; make needs the network this once" >&2; exit 1; }
	@touch $@

# pyarrow and MPI are half as large as everything else; only tests and their users need them.
$(PARQUET): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parquet,mpi]' || { echo "the installation of pyarrow and MPI failed: see the lines above; make test needs the network this once" >&2; exit 1; }
	@touch $@

# For a PyTorch without CUDA (3 GB less): PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-peers.
# llama-cpp-python is compiled, for minutes, and may be missing.
$(PEERS): pyproject.toml $(INSTALLED)
	@echo "installing PyTorch, transformers, peft, llama.cpp, openai and lm_eval into .venv-peers (once)"
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,plot,parquet,lm-eval]' torch==2.13.0 'transformers>=5.24,<6' 'peft>=0.21' openai httpx tiktoken xllamacpp
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python || echo "llama-cpp-python cannot be compiled here: its tests are skipped"
	@touch $@
