# Each command sets up all that it needs in a virtual environment of this repository, .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
EXTENSION := $(wildcard CMakeLists.txt cmake/* csrc/*/* csrc/include/*/*)

.PHONY: demo test bench sanitize lint clean

# Learns a reward on the wine data: installs, then prints the table and writes demo/ (JSON and PNG).
demo: $(VENV)/installed
	$(BIN)/po-bilevel classify --dataset wine --seeds 10 --out demo

# Installs with the test extras, then runs all tests.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest

# Ratios against eager torch and torch.compile, in one process; build/bench.json and a table.
bench: $(VENV)/installed-test
	mkdir -p build
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' \
	  --benchmark-enable --benchmark-json build/bench.json -W default -q
	$(BIN)/python -m benchmarks.table build/bench.json

# The op tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/installed-test
	tests/sanitize.sh $(BIN)/python

lint: $(VENV)/installed-test
	$(PIP) install --quiet ruff mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt $(EXTENSION)
	$(PIP) install --constraint constraints.txt --editable '.[sklearn,plots]'
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt $(EXTENSION)
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build demo
