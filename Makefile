# Longread. `make help` lists the targets; the first call that needs it makes .venv, later calls find it ready.

# `make test-gpu PYTHON=python3` uses that Python as it is and installs nothing.
PYTHON = .venv/bin/python
# The Python that makes .venv, 3.11 or newer.
BASE_PYTHON = python3
# Exact, and installed before everything else: an open range would fetch gigabytes.
TORCH = torch==2.13.0

# Threads that wait for one another sleep: spinning, they starve beside any other busy process.
export OMP_WAIT_POLICY ?= PASSIVE

# The tests start some hundred processes: each would compile torch's sources anew.
unexport PYTHONDONTWRITEBYTECODE

# Added to every call of pytest: `make test PYTEST_ARGS="-n 0 -x"`.
PYTEST_ARGS =
# Added to `make mutants`: `make mutants MUTANTS_ARGS="--only ops/ --minutes 9"`; the same command goes on.
MUTANTS_ARGS =
# A worker for each core; one that has finished takes tests from another.
PARALLEL = -n auto --dist worksteal

INSTALL = .venv/bin/python -m pip --disable-pip-version-check install -qq --no-compile
ifeq ($(PYTHON),.venv/bin/python)
DEMO_READY = .venv/.ready-demo
TEST_READY = .venv/.ready-test
else
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-train demo-think test test-slow test-gpu test-page mutants lint format bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'

demo: $(DEMO_READY) ## a trained model reads a long text and learns from it (a minute)
	$(PYTHON) -m longread demo

demo-train: $(DEMO_READY) ## train, read and compare three models on this machine's own text (10 minutes)
	$(PYTHON) examples/demo.py

demo-think: $(DEMO_READY) ## a trained agent thinks about a board, acts, and is evaluated (seconds)
	$(PYTHON) -m longread think watch
	$(PYTHON) -m longread think evaluate --boards 60 --tries 2 --only-withheld

test: lint ## lint, then every test that takes seconds
	$(PYTHON) -m pytest $(PARALLEL) -m "not slow and not gpu and not browser" $(PYTEST_ARGS)

test-slow: $(TEST_READY) ## the tests that take minutes, and variations of what make test covers
	$(PYTHON) -m pytest $(PARALLEL) -m "slow and not gpu and not browser" $(PYTEST_ARGS)

test-gpu: $(TEST_READY) ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

test-page: $(TEST_READY) ## the served page in a browser; needs Chromium
	$(INSTALL) -r requirements/page.txt
	$(PYTHON) -m pytest -m browser $(PYTEST_ARGS)

mutants: $(TEST_READY) ## put small faults into the method's files and count those that a test notices (hours)
	$(PYTHON) -m tests.mutants $(MUTANTS_ARGS)

lint: $(TEST_READY) ## ruff (rules, security, format) and mypy
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

format: $(TEST_READY) ## rewrite what ruff can
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

bench: $(TEST_READY) ## measure the outer step on this CPU beside a naive loop
	$(PYTHON) -m benchmarks.outer_step_cpu

clean: ## remove the environment and every cache; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready-torch: requirements/demo.txt
	@command -v $(BASE_PYTHON) >/dev/null || { echo "Longread needs Python 3.11 or newer, and $(BASE_PYTHON) was not found: make BASE_PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(BASE_PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Longread needs Python 3.11 or newer, and $(BASE_PYTHON) is %d.%d: make BASE_PYTHON=/path/to/python3.11 ..." % sys.version_info[:2])'
	@echo "Making .venv and installing $(TORCH) ..."
	@$(BASE_PYTHON) -m venv .venv || { echo "$(BASE_PYTHON) cannot make a virtual environment; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@$(INSTALL) "$(TORCH)" -c requirements/demo.txt
	@touch $@

.venv/.ready-demo: .venv/.ready-torch requirements/demo.txt pyproject.toml
	@echo "Installing requirements/demo.txt and Longread itself ..."
	@$(INSTALL) -r requirements/demo.txt
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.ready-test: .venv/.ready-demo requirements/test.txt
	@echo "Installing requirements/test.txt ..."
	@$(INSTALL) -r requirements/test.txt -c requirements/demo.txt
	@touch $@
