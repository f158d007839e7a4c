# One way in: `make help`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test test-unit test-ray check format bench clean

help:  ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plot]'
	@touch $@

demo: $(READY)  ## Train a small model on real sources, serve it from 2 workers, stream completions
	$(BIN)/python -m concertina.orchestrator.demo

test: $(READY)  ## Run every test, the quick ones first
	$(BIN)/pytest -q

test-unit: $(READY)  ## Run the tests that start no server, Ray or extra process
	$(BIN)/pytest -q -m 'not ray'

test-ray: $(READY)  ## Run the tests that start Ray, servers or several processes
	$(BIN)/pytest -q -m ray

check: $(READY)  ## Format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p concertina
	$(BIN)/lint-imports

format: $(READY)  ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Run every benchmark in its quick form
	@for name in exchange placement serving elasticity; do $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

clean:  ## Remove the environment, caches and the demo's checkpoint
	rm -rf $(VENV) .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
