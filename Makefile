# thyroid_rlar: `make help` lists what there is. Each target works alone on a fresh machine.

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
WORKERS ?= 2

# the first Python that will do, 3.11 (what CI runs) before the others; choose another with `make PYTHON=python3.12 run`
PYTHONS    := python3.11 python3.12 python3.13 python3.10
SUPPORTED  := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(firstword $(foreach python,$(PYTHONS) python3,$(shell $(python) -c '$(SUPPORTED)' 2>/dev/null && echo $(python))) python3)
endif

# what `make run` trains: the built-in phantom set, short enough for two CPU cores
RUN_DIR := runs/phantom
RUN     := -p source phantom -p epochs 20 -p out_dir $(RUN_DIR)
# an earlier run there with other parameters, as after an update, is renamed, with a sentence that says so
SET_ASIDE := import sys; from thyroid_rlar.runs import set_aside; set_aside(dict(zip(sys.argv[1::2], sys.argv[2::2])))

# how long, or how many more inputs: `python tests/fuzz.py --help`
FUZZ := --minutes 10

# notebooks run on the environment's own kernel, whatever kernels the user has
export JUPYTER_PREFER_ENV_PATH := 1
# the profiler, which measures memory, would print two lines at each use
export KINETO_LOG_LEVEL := 99

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lab pictures bench fuzz prepare hooks env check-python clean distclean

help:  ## list the targets
	@echo 'make TARGET, with TARGET one of'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'With another Python (3.10 to 3.13): make PYTHON=python3.12 TARGET'

run: env  ## install what is missing, train and report on the built-in phantom images
	$(call need,nbs/runs/train.ipynb)
	@$(BIN)/python -c '$(SET_ASIDE)' $(filter-out -p,$(RUN))
	mkdir -p $(RUN_DIR)
	$(BIN)/papermill nbs/runs/train.ipynb $(RUN_DIR)/train.ipynb $(RUN)
	@echo 'Done: the executed notebook is $(RUN_DIR)/train.ipynb, the report $(RUN_DIR)/report.html'

test: env  ## install what is missing, then run every notebook's tests and pytest
	@notebooks=passed; tests=passed; \
	echo '== notebooks (nbdev_test)'; \
	gpu=`$(BIN)/python -c 'import torch; print("cuda" * torch.cuda.is_available())'`; \
	OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/nbdev_test --flags "$$gpu" --n_workers $(WORKERS) --do_print --timing || notebooks=FAILED; \
	echo '== tests (pytest)'; \
	OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder || tests=FAILED; \
	echo "== notebooks: $$notebooks; tests: $$tests"; \
	[ $$notebooks = passed ] && [ $$tests = passed ]

lab: env  ## open JupyterLab on the explorers, with the phantom run, which is trained first if there is none
	@[ -f $(RUN_DIR)/metrics.json ] || $(MAKE) --no-print-directory run
	$(BIN)/jupyter lab nbs/explore.ipynb --LabApp.news_url=None

pictures: env  ## draw README's pictures of the explorers anew, from the phantom run, in a browser
	@[ -f $(RUN_DIR)/metrics.json ] || $(MAKE) --no-print-directory run
	$(BIN)/python tests/pictures.py $(RUN_DIR)

bench: env  ## measure the speed and memory of each method
	$(call need,nbs/runs/benchmark.ipynb)
	mkdir -p runs/bench
	$(BIN)/papermill nbs/runs/benchmark.ipynb runs/bench/benchmark.ipynb -p out_dir runs/bench

fuzz: env  ## damaged input for every reader, ten minutes more; or FUZZ='--inputs 10000 --readers xml'
	$(BIN)/python tests/fuzz.py $(FUZZ)

prepare: env  ## before a commit: export the package, clean the notebooks, write README.md
	$(BIN)/python tests/prepare.py

hooks: env  ## git and Jupyter hooks: notebooks merge, diff and save without noise
	$(BIN)/nbdev_install_hooks
	git config --local diff.ipynb.textconv '$(CURDIR)/$(BIN)/jupyter nbconvert --log-level ERROR --to python --stdout'
	@echo 'git finds the tools once the environment is active: . $(BIN)/activate'

env: check-python $(READY)  ## only make the environment .venv

clean:  ## remove what builds and test runs leave behind (not runs/, not .venv)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis _proc _docs
	find nbs thyroid_rlar tests -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

distclean: clean  ## the same, and remove the environment .venv
	rm -rf $(VENV)

# A Python named on the command line, but an environment made with another one: say so, do not run the wrong one in silence.
check-python:
ifeq ($(origin PYTHON),command line)
	@[ ! -e $(READY) ] || [ "`$(BIN)/python -V`" = "`$(PYTHON) -V 2>/dev/null`" ] || { \
	  echo "$(VENV) was made with `$(BIN)/python -V`. To use $(PYTHON): make distclean, then this command again."; exit 1; }
endif

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c '' 2>/dev/null || { \
	  echo 'No Python found as "$(PYTHON)". Install Python 3.11 (3.10 to 3.13 will do), or name yours: make PYTHON=/path/to/python3.11 run'; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { \
	  echo "$(PYTHON) is `$(PYTHON) -V 2>&1`; this project needs Python 3.10, 3.11, 3.12 or 3.13. Choose one: make PYTHON=python3.11 run"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@cc=$${CC:-`$(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")'`}; command -v $${cc%% *} >/dev/null || { \
	  echo "No C compiler ($$cc), which building pyradiomics needs. On Debian or Ubuntu: apt-get install gcc; elsewhere set CC."; exit 1; }
	@include=`$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'`; [ -f "$$include/Python.h" ] || { \
	  echo "No Python.h in $$include, which building pyradiomics needs. On Debian or Ubuntu: apt-get install python3-dev"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,solvers,bench]' || { \
	  echo 'Installing failed, see above. It needs a way to a Python package index and about 8 GB of disk.'; exit 1; }
	@touch $@

define need
@[ -f $(1) ] || { echo '$(1) is not there yet, so there is nothing for "make $@" to run.'; exit 1; }
endef
