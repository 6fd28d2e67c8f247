# Two targets for a newcomer, bench and test; both set everything up first. PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
KERNELS := $(filter-out %.so,$(wildcard kernels/cpu/*.pyx kernels/cpu/*.pxi kernels/cpu/*.h))

bench: setup
	$(BIN)/python -m fastseq bench

test: setup
	$(BIN)/python -m pytest

lint: export PATH := $(abspath $(BIN)):$(PATH)
lint: setup
	ruff check
	ruff format --check
	mypy
	cython-lint kernels

setup: $(VENV)/built.stamp

# The build tools first: the extensions are built without isolation, against the pinned Cython.
$(VENV)/packages.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools cython
	touch $@

$(VENV)/built.stamp: $(VENV)/packages.stamp setup.py pyproject.toml $(KERNELS)
	$(PIP) install -c constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info kernels/cpu/*.so

.PHONY: bench test lint setup clean
