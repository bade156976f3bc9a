# make demo     train, prune and fine-tune a small network on handwritten digits
# make test     the tests that run on every change
# make check    formatting, lint, types and the quick tests
# make fuzz     random networks: pruned == masked (N=20000 of them)
# make zoo      every torchvision CNN        make bench    time beside Torch-Pruning
# make zoo-all  whole zoos, beside Torch-Pruning: hours (LISTS, ONLY, LIMIT, MEMORY choose)
# make wheel    build the wheel              make clean    remove what these made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
N ?= 20000
JOBS ?= 2

# Several test processes share the cores: one thread each.
test check: export OMP_NUM_THREADS := 1

.PHONY: demo test check format fuzz fuzz-files docs pages zoo zoo-all zoo-page bench wheel clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not zoo"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) -q -m "not slow and not zoo" $(FAST)

# What a change to the core breaks first; the other tests take minutes.
FAST := --ignore=tests/test_laws.py --ignore=tests/test_zoo.py --ignore=tests/test_examples.py \
	--ignore=tests/test_wheel.py --ignore=tests/test_zoo_spread.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(VENV)/.dev
	$(BIN)/python benchmarks/fuzz.py --count $(N) --jobs $(JOBS)

fuzz-files: $(VENV)/.dev
	$(BIN)/python -m benchmarks.fuzz_files --jobs $(JOBS)

docs: $(VENV)/.dev
	$(BIN)/zensical build --clean --strict

# The pages of the reference that are made from the data.
pages: $(VENV)/.dev
	$(BIN)/python -m tools.pages

zoo: $(VENV)/.dev
	$(BIN)/python benchmarks/torchvision_table.py

# A stopped run goes on where it was; what it found stands in $(ZOO).
LISTS ?= torchvision timm-families timm
ONLY ?= *
LIMIT ?= 300
MEMORY ?= 8
ZOO ?= zoo.jsonl

zoo-all: $(VENV)/.bench
	$(BIN)/python -m benchmarks.zoo $(LISTS:%=--list %) --only "$(ONLY)" --resume $(ZOO) \
		--limit $(LIMIT) --memory $(MEMORY) --jobs $(JOBS) --out docs/zoo.md

zoo-page: $(VENV)/.bench
	$(BIN)/python -m benchmarks.zoo --page $(ZOO:%=--resume %) --out docs/zoo.md

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/prune_time.py

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf dist build site .cache demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp for each set of extras: an install runs again only when pyproject.toml changed.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[dev,bench]"
	@touch $@ $(VENV)/.dev $(VENV)/.demo
