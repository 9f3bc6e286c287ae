# What a person types: make quickstart, then make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast lint clean

quickstart: $(BIN)/vqbeam
	$(BIN)/vqbeam run glyphs --run-dir runs/glyphs
	$(BIN)/vqbeam sample runs/glyphs --output samples.png

test: $(VENV)/.test-installed lint
	$(BIN)/python -m pytest -q
	KERAS_BACKEND=jax $(BIN)/python -m pytest -q -m backend

test-fast: $(VENV)/.test-installed
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs samples.png

# One recipe installs both sets, so that the versions are those of constraints.txt either way.
$(BIN)/vqbeam: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test-installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .[test]
	touch $@
