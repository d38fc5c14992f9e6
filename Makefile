# `make train` and `make test` set everything up on a fresh machine; nothing else is needed first.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready

.PHONY: train test lint format bench gpu clean

train: $(READY)
	$(RUN) -m gpn_triton.train --amp $(ARGS)

# a file of tests at a time in each of a few processes, which share the cores between them
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(READY)
	$(RUN) -m pytest bench/ --benchmark-only $(ARGS)

# for a machine with a GPU and torch, triton and pytest already there; installs nothing
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis
