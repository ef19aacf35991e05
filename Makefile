# The two commands to start with are `make demo` and `make test`. Each makes the virtual environment and installs what
# it needs, pinned by constraints.txt. Override on the command line: PYTHON=python3.12, VENV=/some/where.

PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
BENCH ?= $(shell sed -n 's/^    "\([a-z_]*\)",$$/\1/p' benchmarks/report.py)

# The build backend is pinned too: older pip reads the first name for it, newer pip the second.
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT = $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-lowest thorough lint format typecheck docs bench ci clean
.SECONDARY:

help:
	@echo "make demo       evaluate the shipped digits network: bits/dim, its uncertainties, cost, a picture"
	@echo "make test       all tests"
	@echo "make test-gpu   the tests of a GPU, played by the host where there is none"
	@echo "make test-lowest all tests with the oldest versions allowed: several GB, in a virtual environment of their own"
	@echo "make thorough   all tests, with many more and random examples per property"
	@echo "make lint       ruff: rules and format         make format     the same, mending what can be mended"
	@echo "make typecheck  mypy, strict                   make docs       the documentation, warnings are errors"
	@echo "make bench      the benchmarks                 make ci         everything a change must pass, from nothing"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: made again when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/sdekit demo $(DEMO_ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS)

# The tests of a GPU, on one played by the host where there is none (tests/emulated_cuda.py).
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) tests/gpu $(if $(shell command -v nvidia-smi),,--emulate-cuda)

# As `test`, but for what only says how the newest tools want things written (tests/test_house.py).
test-lowest: export PIP_CONSTRAINT = $(CURDIR)/constraints-lowest.txt
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -e ".[test]"
	.venv-lowest/bin/python -m pytest -n $(WORKERS) --ignore=tests/test_house.py

thorough: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=thorough

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-test
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.installed-bench
	for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name $(BENCH_ARGS) || exit 1; done

ci:
	bash .ci/run

clean:
	rm -rf $(VENV) docs/_build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
