# Everything runs in an environment of its own, made on first use from the first Python 3.11 or newer on the path.
#   make demo        stream a story from the model that ships in the package
#   make test        run the whole test suite
#   make lint        check style and formatting (ruff)
#   make types       check types (pyright)
#   make wheel-test  build sdist and wheel, install the wheel elsewhere and use it
#   make clean       remove what the others made
# Options: PYTHON=/path/to/python3   VENV=folder   PROMPT="..."   SEED=1   ARGS="arguments for pytest"

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
endif
VENV ?= .venv
PROMPT ?= Once upon a time there was a king who had three daughters
SEED ?= 4
ARGS ?=

BIN := $(VENV)/bin
INSTALL := @sh .ci/venv "$(PYTHON)" "$(VENV)"

.PHONY: help demo test lint types wheel-test clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo:
	$(INSTALL)
	@"$(BIN)/ferrum-jax" run demo "$(PROMPT)" --temperature 0.7 --top-p 0.9 --repetition-penalty 1.1 --seed $(SEED)

test:
	$(INSTALL) test
	@"$(BIN)/python" -m pytest $(ARGS)

lint:
	$(INSTALL) dev
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .

types:
	$(INSTALL) dev
	@"$(BIN)/pyright" --pythonpath "$(BIN)/python"

wheel-test:
	$(INSTALL) dev
	@"$(BIN)/python" tests/packaging/wheel_test.py

clean:
	rm -rf .venv .cache .ci/.cache .hypothesis .pytest_cache .ruff_cache build dist kernels/ferrum_kernels/libferrum_cpu.*
	find kernels/cmake -mindepth 1 ! -name CMakeLists.txt -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
