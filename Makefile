# make demo   a video from a prompt   make test   every check and test   make quick   the tests that are not slow
# make docs   the documentation, into build/site; a broken link or a public name without a docstring fails
# make reproduce   the paper in miniature: hours, goes on where it stopped (REPRODUCE="--set a.b=c" changes settings)
# Both create .venv when it is missing and need nothing but Python 3.10 or later with venv.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
OUTPUT ?= outputs/demo.mp4
PROMPT ?= a large red star moves right on a black background
TESTS ?= tests
RESULTS ?= docs/results/miniature
REPRODUCE ?=
export PROMPT

RUN := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadgroup
# torch first and alone: whichever build of this range is at hand is taken, the small CPU build where there is no other.
TORCH := torch>=2.9,<2.14

.PHONY: demo test quick check site docs style types format reproduce clean

demo: $(VENV)/.installed
	$(VENV)/bin/sparse-forcing generate "$$PROMPT" --output $(OUTPUT) --check || test $$? -eq 1  # 1: a wrong picture, said above

test: $(VENV)/.installed-dev
	$(MAKE) --jobs $(JOBS) check
	$(PYTEST) $(TESTS)

quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(TESTS)

reproduce: $(VENV)/.installed-dev
	$(RUN) -m sparse_forcing.cli.reproduce --config training/configs/reproduce.yaml --output runs/reproduce \
		--results $(RESULTS) $(REPRODUCE)

docs: site
	$(RUN) -m pytest -p no:cacheprovider tests/test_api_reference.py

site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

check: style types site

style: $(VENV)/.installed-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

types: $(VENV)/.installed-dev
	$(RUN) -m mypy

format: $(VENV)/.installed-dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
