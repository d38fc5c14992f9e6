# `make train` and `make test` set everything up on a fresh machine; nothing else is needed first.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready
OLDEST = .venv-oldest
COMPAT = kernels_interpreted kernels_binning kernels_offline kernels_cpu gpn reference lif \
	spike_linear event_linear engine clients bench

.PHONY: train test compat lint types format docs bench gpu clean

train: $(READY)
	$(RUN) -m gpn_triton.train --amp $(ARGS)

# a file of tests at a time in each of a few processes, which share the cores between them
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# kernels, operators, engine and benchmarks with the oldest torch and triton that are promised
compat: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		$(addprefix tests/test_,$(addsuffix .py,$(COMPAT))) $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(VENV)/bin/basedpyright --pythonpath $(RUN)

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# opens without a network: site/index.html
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

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

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[test]'
	touch $(OLDEST)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .ruff_cache .benchmarks \
		.hypothesis
