# Everything below sets itself up on a fresh machine that has Python 3.11: make quickstart, make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
BIN := .venv/bin
CORE := .venv/.core
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart demo-silos test chaos clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(CORE) ## Federated tuning on this machine, offline, in a few minutes; ends with a table and runs/quickstart/report.html
	$(BIN)/fedfm quickstart

demo-silos: $(READY) ## A consortium on this machine: broker, coordinator and four members as processes of their own; a run and its report
	$(BIN)/python -m fedfm.service.demo

# One thread in each process: two tests share two cores, and a run's numbers are exact for one number of threads.
test: export OMP_NUM_THREADS = 1
test: $(READY) ## Lint, types and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist worksteal

chaos: $(READY) ## Kill coordinator, broker and members at every durable step and at 200 random instants; ends with a table
	$(BIN)/python -m benchmarks.chaos

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(BIN)/python -m compileall -q src
	@touch $@

$(READY): $(CORE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,data,track,demo,deploy,privacy]'
	@touch $@

clean: ## Remove what was installed, built and cached here; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -exec rm -rf {} +
