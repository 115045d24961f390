# The only commands anyone needs. Each sets up what it uses: a virtual environment in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.PHONY: help setup demo serve test check format bench image clean

help:  ## Show the commands
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 10

setup: $(STAMP)  ## Make the virtual environment

$(STAMP): pyproject.toml constraints.txt client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,demo]" -e ./client
	@touch $@

demo: $(STAMP)  ## Start a server, let agents fill it with the standard library's documentation, ask it questions
	$(BIN)/htm-service demo $(ARGS)

serve: $(STAMP)  ## Start a server on 127.0.0.1:8000
	$(BIN)/htm-service serve $(ARGS)

test: $(STAMP)  ## Run the tests with coverage
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

check: $(STAMP)  ## Format, lint, types, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Measure served attends against the naive service
	$(BIN)/python -m bench.served $(ARGS)

image:  ## Build the Docker image
	docker build -t htm-service .

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build *.egg-info client/*.egg-info
