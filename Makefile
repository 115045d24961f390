# The only commands anyone needs; each first sets up what it uses, in .venv. They need Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# pip from outside installs into the environment: some distributions' Python cannot put a pip of its own there.
PIP    := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check install -q -c constraints.txt
AXE    := 4.14.1
PEERS  := .venv-peers
REPORT := .venv-report
ARGS   ?=
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup browser promtool ballet demo serve test faults fuzz report check format bench bench-breakdown bench-gpu gpu-check bench-peers bench-plots image clean

help:  ## Show the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s%s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## Make the virtual environment in .venv

# torch first, at the pin of constraints.txt: nothing after it can choose another build.
$(STAMP): pyproject.toml constraints.txt client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is Python %d.%d. Name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import pip, venv' || { echo "Python needs its modules pip and venv" >&2; exit 1; }
	@echo "Setting up .venv: some minutes, mostly for torch"
	@$(PYTHON) -m venv --without-pip $(VENV)
	@$(PIP) torch
	@$(PIP) -e ".[dev,demo,ballet,postgresql,otel]" -e ./client
	@touch $@

# Without root, or without Debian's packages, a Chromium that is there already is used. axe-core is a file, nothing runs it here.
browser: $(STAMP)  ## What the tests of the page need: Chromium from Debian's packages, axe-core from npm
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends chromium >/dev/null; } \
		|| echo "Chromium is not there and cannot be installed: the tests of the page are left out" >&2
	@npm install --prefix $(VENV)/npm --no-save --no-audit --no-fund --ignore-scripts --silent axe-core@$(AXE) \
		|| echo "axe-core cannot be had from npm: the tests of accessibility are left out" >&2

# Taken out of the package and not installed, because that would start a Prometheus.
promtool: $(STAMP)  ## What the tests of deploy/ need: promtool, from Debian's package prometheus
	@command -v promtool >/dev/null || [ -x $(VENV)/promtool/usr/bin/promtool ] || { command -v apt-get >/dev/null \
		&& { [ "$$(id -u)" != 0 ] || apt-get update -qq; } && cd $(VENV) \
		&& apt-get download -qq prometheus 2>/dev/null && dpkg-deb -x prometheus_*.deb promtool && rm prometheus_*.deb; } \
		|| echo "promtool is not there and cannot be fetched: its tests of deploy/ are left out" >&2

ballet: $(STAMP)  ## Let an agent learn the Ballet task through a server, and measure it: up to half an hour (ARGS=--short)
	@$(BIN)/python -m examples.ballet $(ARGS)

demo: $(STAMP)  ## Start a server, let agents fill it with Python's documentation, ask it questions (ARGS="--keep")
	@$(BIN)/python -m examples.demo $(ARGS)

serve: $(STAMP)  ## Serve on 127.0.0.1:8000 (ARGS="--data DIR")
	@$(BIN)/htm-service serve $(ARGS)

# In two processes, each with whole files: half of the time is waiting. ARGS="-n 0" runs them in one, for --pdb or to be quiet.
test: $(STAMP)  ## Run all tests with coverage (ARGS="-k arena")
	$(BIN)/python -m pytest --cov -n 2 --dist loadfile $(ARGS)

faults: $(STAMP)  ## Provoke R1 to R14, R16 and R18 in full, up to half an hour; make test has a little of each (ARGS="-k r1_")
	@$(BIN)/python -m pytest tests/faults --full -q $(ARGS)

fuzz: $(STAMP)  ## R13 in full: requests made of openapi.json and bodies of the binary format, 10,000 in all
	@$(BIN)/python -m pytest tests/faults/test_r13_fuzzing.py --full -q $(ARGS)

# In an environment of their own, so that the tools are not among what they report.
report: $(STAMP)  ## What is installed: versions and licences, and a bill of materials (build/sbom.json, CycloneDX)
	@$(PYTHON) -m venv --without-pip $(REPORT)
	@$(PYTHON) -m pip --python $(REPORT)/bin/python --disable-pip-version-check install -q pip-licenses cyclonedx-bom
	@mkdir -p build
	@$(REPORT)/bin/cyclonedx-py environment $(BIN)/python -o build/sbom.json
	@$(REPORT)/bin/pip-licenses --python=$(BIN)/python --order=license

check: $(STAMP)  ## Format, lint, types, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP)  ## Format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## S1 to S12, S14, S15, S17 to S22, A1, C1 and C2, each beside its bar (ARGS="--only S1,S4", ARGS=--quick)
	@$(BIN)/python -m bench $(ARGS)

bench-breakdown: $(STAMP)  ## Where the time goes, and how it grows: the tables of docs/performance.md (ARGS=--quick)
	@$(BIN)/python -m bench.breakdown $(ARGS)

bench-gpu: $(STAMP)  ## The batch kernel on a GPU, beside what that copies (ARGS="--sessions 16")
	@$(BIN)/python -m bench.gpu $(ARGS)

# Not $(STAMP): on a GPU machine what is there is used, PYTHON with its torch for CUDA, and nothing is fetched.
gpu-check:  ## Everything on an NVIDIA GPU within six minutes: tests, parity, rates (GPU_PYTHON=python3 takes that one's packages)
	@PYTHONPATH=.:client $(GPU_PYTHON) -m bench.gpu_check

bench-peers: $(STAMP) $(PEERS)/.installed  ## Beside Chroma and PostgreSQL with pgvector (ARGS="--only htm,chroma", ARGS=--quick)
	@$(BIN)/python -m bench.peers --environment $(PEERS) $(ARGS)

# What cannot be installed here is no error: the benchmark says what it did not find.
$(PEERS)/.installed: bench/peers-requirements.txt
	@echo "Setting up $(PEERS): a minute or two"
	@$(PYTHON) -m venv --without-pip $(PEERS)
	@$(PYTHON) -m pip --python $(PEERS)/bin/python --disable-pip-version-check install -q -r $< \
		&& touch $@ || echo "The peers could not be installed; those that are there are measured" >&2

bench-plots: $(VENV)/.plots  ## Draw docs/benchmarks/*.svg from new figures (ARGS=--draw-only, ARGS=--quick)
	@$(BIN)/python -m bench.plots $(ARGS)

$(VENV)/.plots: $(STAMP)
	@$(PIP) -e ".[plots]"
	@touch $@

image:  ## Build the image htm-service (ARGS="--build-arg ...", see Dockerfile)
	docker build -t htm-service $(ARGS) .

clean:  ## Remove the environment, caches and build output
	rm -rf $(VENV) $(PEERS) $(REPORT) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build *.egg-info client/build client/*.egg-info
