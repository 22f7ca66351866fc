# Six verbs. Each does its own set-up in .venv; nothing outside this folder is touched.
PYTHON ?= python3
# Any torch will do. On Linux without a GPU, a CPU build saves gigabytes: see "Installing" in docs/guides/install.md.
TORCH ?= torch==2.13.0
BIN := .venv/bin

# Tests wait about a third of their time, for processes and pages; four at once keep two cores busy.
WORKERS ?= 4
KILLS ?= 200

.PHONY: demo test test-cluster lint docs clean

demo: .venv/installed  ## train the shipped model to think, and show what changed
	$(BIN)/posttrain demo

test: .venv/browser  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cluster: .venv/installed  ## clusters of every shape, killed at random moments and at every failpoint; takes long
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.cluster_nightly --kills $(KILLS)

lint: .venv/installed  ## style and types
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/pyright

docs: .venv/installed  ## write the generated pages of docs/ anew
	$(BIN)/python docs/generate.py

clean:  ## remove what the other verbs made (run folders stay)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "posttrain needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

.venv/browser: .venv/installed tests/install_browser.sh
	tests/install_browser.sh $(BIN)/python
	touch $@
