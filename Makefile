# Each command sets up all that it needs in a virtual environment of this repository, .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
BENCH = mkdir -p build && $(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' \
  -o python_functions='bench_*' --benchmark-enable -W default -q
SOURCES := $(shell find csrc -type f)
# With the folders, whose times say that a file was removed.
EXTENSION := CMakeLists.txt $(wildcard cmake/*) $(shell find csrc)

# The libraries that people train in, and whatever of verl its losses import: it asks for a cluster's worth.
INTEGRATIONS := .venv-integrations
VERL := codetiming dill hydra-core orjson tensordict

.PHONY: demo test test-fast test-ptx test-integrations fuzz bench bench-check bench-quick count count-gpu docs sanitize lint format clean

# Learns a reward on the wine data: installs, then prints the table and writes demo/ (JSON and PNG).
demo: $(VENV)/installed
	$(BIN)/po-bilevel classify --dataset wine --seeds 10 --out demo --overwrite

# Installs with the test extras, then runs all tests.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest --durations 20

# For work in progress: fewer random cases and no slow test, in two and a half minutes.
test-fast: $(VENV)/installed-test
	$(BIN)/python -m pytest --fast --durations 10

# The GPU kernels, as the PTX that Triton and nvcc (where it is) compile them to, in an interpreter: three minutes.
test-ptx: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/ptx/every_triton_kernel.py tests/ptx/every_cuda_kernel.py --durations 5

# With TRL, peft, TorchRL and verl, in an environment of their own over that of the tests: what calls us there does as they do.
test-integrations: $(INTEGRATIONS)/installed
	HF_HUB_OFFLINE=1 $(INTEGRATIONS)/bin/python -m pytest tests/integrations tests/ops/test_policy_packages.py --durations 5

# Random calls of every op for hours, each fault as code that shows it: make fuzz MINUTES=30 SEED=7.
MINUTES ?= 480
fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# Ratios against eager torch and torch.compile, in one process; build/bench.json and a table.
bench: $(VENV)/installed-test
	$(BENCH) --benchmark-json build/bench.json
	$(BIN)/python -m benchmarks.report table build/bench.json

# Fails if a ratio fell by more than a quarter below its baseline, beyond the spread, or is missing.
bench-check: bench
	$(BIN)/python -m benchmarks.report check build/bench.json

# A few cases in half a minute: wrong answers fail, slow ones are reported, for the machine may be noisy.
bench-quick: $(VENV)/installed-test
	export PO_KERNELS_BENCH_SECONDS=0.5; $(BENCH) -m quick --benchmark-json build/bench-quick.json
	-$(BIN)/python -m benchmarks.report check --part build/bench-quick.json

# Fails if a native kernel takes over 3% more instructions than its baseline; needs valgrind, and half a minute.
count: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.count

# Fails if a GPU kernel takes over 5% more instructions, bytes or registers than its baseline; no GPU, some minutes, or
# with QUICK=1 about one.
count-gpu: $(VENV)/installed-test
	$(BIN)/python -m tests.ptx --check $(if $(QUICK),--quick)

# The documentation as a site, build/site; a warning fails. `build/site/index.html` opens in a browser.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --strict --quiet

# The op tests on extensions built with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(VENV)/installed-test
	tests/sanitize.sh $(BIN)/python

# What a commit has to pass; `make format` mends what can be mended by itself.
lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/user.py

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Built with the environment's own tools: with others each time, as pip would have, all is compiled again each time.
INSTALL := $(PIP) install --constraint constraints.txt --no-build-isolation --editable

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.25' ninja

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt $(EXTENSION)
	$(INSTALL) '.[sklearn,plots]'
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt $(EXTENSION)
	$(INSTALL) '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(VENV)/installed-lint
	$(INSTALL) '.[docs]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed-test
	$(PIP) install --constraint constraints.txt ruff mypy clang-format
	touch $@

# It sees the packages of the other one, and the extension that was built there.
$(INTEGRATIONS)/installed: $(VENV)/installed-test
	$(BIN)/python -m venv $(INTEGRATIONS)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > "$$($(INTEGRATIONS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	$(INTEGRATIONS)/bin/pip --disable-pip-version-check install --constraint constraints.txt 'trl>=1.16,<2' peft \
	  'torchrl>=0.14' $(VERL)
	$(INTEGRATIONS)/bin/pip --disable-pip-version-check install --no-deps 'verl>=0.9,<0.10'
	$(INTEGRATIONS)/bin/python -W ignore -c 'import peft, torchrl, trl.trainer.grpo_trainer, verl.trainer.ppo.core_algos'
	touch $@

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build demo
