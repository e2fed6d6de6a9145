# make demo            fine-tune the shipped Hopper policy and show the return before and after (5 to 10 minutes)
# make test            everything that can be checked on this machine, but for the longest tests of their kind
# make test-slow       these
# make parity-report   how far this port is from the PyTorch reference, quantity by quantity, to figure/parity/
# make benchmark       speed; with UPSTREAM=<checkout of the PyTorch DPPO> the two side by side, and with
#                      UPSTREAM_PYTHON=<interpreter that has its simulators> whole iterations as well
# make benchmark-scale how cost grows with environments, denoising steps, widths, data …, to figure/scale/ and docs/speed.md
# make docs            the documentation as a site, to build/site; broken links fail
# make lint            style, types, and the contracts of the package: what may import what, sizes, shapes in docstrings
# make coverage        the share of the package's statements that make test runs
# make clean           remove .venv and caches (runs in log/ stay)
#
# Variables: PYTHON (an interpreter, 3.11 to 3.13), PIP_ARGS (more options for pip), WORKERS (test processes).

SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
  "$$name" -c '$(SUITABLE)' 2>/dev/null && { echo "$$name"; break; }; done)
PIP_ARGS ?=
WORKERS ?= 2
UPSTREAM ?=
UPSTREAM_PYTHON ?=

VENV := .venv
RUN := $(VENV)/bin/python
TEST_EXTRAS := gym,kitchen,mpe,kuka,parity,test
ROBOSUITE := $(shell sed -n 's/.*"\(robosuite==[0-9.]*\)".*/\1/p' setup.py | head -n 1)
PACKAGING := setup.py pyproject.toml
SUITES := parity_tests tests
# A process for each suite, because compiled programs are never freed: new processes need less memory.
# worksteal: each process begins with tests that stand together, so that few fixtures of modules are made twice.
pytest = $(RUN) -m pytest $(1) $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)

.PHONY: help demo test test-slow coverage docs parity-report benchmark benchmark-scale lint clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.gym
	@$(RUN) script/demo.py

test: $(VENV)/.test
	@status=0; for suite in $(SUITES); do $(call pytest,$$suite) || status=1; done; exit $$status

test-slow: $(VENV)/.test
	@$(call pytest,parity_tests tests -m slow)

coverage: $(VENV)/.test
	@$(RUN) -m coverage erase
	@for suite in $(SUITES); do $(call pytest,$$suite) --cov --cov-append --cov-report=; done; \
	echo "statements that are run: $$($(RUN) -m coverage report --format=total)%"

parity-report: $(VENV)/.test
	@$(RUN) -m parity_tests.report

benchmark: $(VENV)/.test
	@$(RUN) benchmarks/run.py $(if $(UPSTREAM),--upstream $(UPSTREAM)) \
	  $(if $(UPSTREAM_PYTHON),--upstream-python $(UPSTREAM_PYTHON))

benchmark-scale: $(VENV)/.test
	@$(RUN) benchmarks/scale.py --readme docs/speed.md

docs: $(VENV)/.docs
	@$(RUN) -m mkdocs build --quiet --strict
	@echo build/site/index.html

lint: $(VENV)/.test
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(RUN) -m tests.contracts

clean:
	rm -rf $(VENV) build dist .coverage* .pytest_cache .ruff_cache .mypy_cache .hypothesis code/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file says that a step is done, so that a second call starts at once.
# $(call step,what is printed,command)
define step
@printf '%s … ' '$(1)'; start=$$(date +%s); \
if ! { $(2); } >$(VENV)/step.log 2>&1; then echo failed; tail -n 25 $(VENV)/step.log; exit 1; fi; \
echo "$$(($$(date +%s) - start)) s"
endef

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install it, or name it: make PYTHON=/path/to/python3.11 …"; exit 2; }
	@$(PYTHON) -c '$(SUITABLE)' \
	|| { echo "$(PYTHON) is $$($(PYTHON) --version); 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11 …"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "$(PYTHON) lacks the venv module: on Debian or Ubuntu, apt install python3-venv"; exit 2; }
	@mkdir -p $(VENV)
	$(call step,Making $(VENV) with $(PYTHON),$(PYTHON) -m venv $(VENV))
	@touch $@

$(VENV)/.gym: $(VENV)/.made $(PACKAGING)
	$(call step,Installing TensorFlow and MuJoCo with pip (a few minutes the first time),$(RUN) -m pip install $(PIP_ARGS) -e '.[gym]')
	@touch $@

$(VENV)/.docs: $(VENV)/.gym $(PACKAGING)
	$(call step,Installing the tools of the site with pip,$(RUN) -m pip install $(PIP_ARGS) -e '.[docs]')
	@touch $@

# One of the packages that robosuite asks for needs a C compiler (evdev, for keyboards); the extra `test` has the others.
$(VENV)/.test: $(VENV)/.gym $(PACKAGING)
	$(call step,Installing PyTorch and the test tools with pip,$(RUN) -m pip install $(PIP_ARGS) -e '.[$(TEST_EXTRAS)]' \
	&& $(RUN) -m pip install $(PIP_ARGS) --no-deps $(ROBOSUITE))
	@touch $@
