# Two commands on a fresh machine with python3 and its venv module: `make demo`, `make test`.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
FIGURES := $(CURDIR)/outputs/stress.jsonl
FACTS := settings.ini setup.py pyproject.toml
KIND := requirements/$(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c 'import platform, sys; print("python%d.%d-%s-%s.txt" % (*sys.version_info[:2], sys.platform, platform.machine()))' 2>/dev/null)
LOCK ?= $(wildcard $(KIND))  # versions known to work together, where there is a file for this Python and machine; make LOCK= … does without
OLDEST := golden_model golden_parts rivals segmenter evaluation metrics protocol resume explore errors

.PHONY: help demo bench test stress lint export docs readme picture trained lock oldest clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "mbs needs Python 3.10 or newer: call make with PYTHON=/path/to/python3.10"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3 cannot make virtual environments here: on Debian or Ubuntu run apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/made $(FACTS) $(LOCK)
	@echo "Installing mbs and what it needs into .venv, $(or $(LOCK:%=as in %),in the newest versions) (several minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(LOCK:%=-c %) -e .
	@touch $@

.venv/developer: .venv/made $(FACTS) $(LOCK)
	@echo "Installing mbs with its developer tools into .venv, $(or $(LOCK:%=as in %),in the newest versions) (several minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(LOCK:%=-c %) -e '.[dev,pretrained,cluster,app]'
	@touch $@ .venv/installed

bench: .venv/developer ## every benchmark, ratios to a plain eager composition, into benchmarks/RESULTS.md
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

demo: .venv/installed ## class-incremental learning on generated scenes, three methods compared
	@$(BIN)/mbs demo

test: .venv/developer ## every test, JOBS at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

stress: .venv/developer ## everything that can go wrong, in full (9 minutes on two cores); its figures go into docs/stress.md
	@rm -f $(FIGURES)
	@MBS_FIGURES=$(FIGURES) MBS_KILLS=40 MBS_NOTEBOOK_KILLS=12 MBS_EVERY_KILL=1 MBS_NOTEBOOK_SAVES=6 MBS_FAULTS=90 MBS_MUTATIONS=250 MBS_LONG=3 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $$(grep -l "from figures import kept" tests/test_*.py)
	@$(BIN)/python docs/stress.py $(FIGURES)

lint: .venv/developer ## style and format of code and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

export: .venv/developer ## notebooks → package, notebooks cleaned
	@$(BIN)/nbdev-clean && $(BIN)/nbdev-export

docs: .venv/developer ## the documentation site: _docs/html/index.html
	@$(BIN)/python docs/build.py && echo "_docs/html/index.html"

readme: .venv/developer ## README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

picture: .venv/installed ## the picture of README.md, from the runs that make demo leaves
	@$(BIN)/python docs/picture.py

trained: .venv/installed ## the small runs in nbs/trained that the notebooks show
	@$(BIN)/python nbs/trained/train.py

lock: .venv/developer ## the versions in .venv become those that are installed; after make clean, with LOCK= , the newest
	@{ echo "# Every package of the developer environment; made by make lock"; $(BIN)/python -m pip freeze --all --exclude pip --exclude mbs; } > $(KIND)
	@$(BIN)/python docs/dependencies.py
	@touch .venv/installed .venv/developer && echo $(KIND)

# The numbers after >= in settings.ini, and no newer release of anything there.
.oldest/made: $(FACTS)
	@$(PYTHON) -m venv .oldest
	@sed -nE 's/^ +([a-z0-9-]+)(\[[a-z]+\])?>=([0-9.]+).*/\1==\3/p' settings.ini > .oldest/constraints.txt
	@echo "Installing the oldest releases that mbs supports into .oldest (several minutes the first time)"
	@.oldest/bin/python -m pip install -q --disable-pip-version-check -c .oldest/constraints.txt -e '.[pretrained]' pytest hypothesis scikit-learn
	@touch $@

oldest: .oldest/made ## what computes, tested with the oldest releases that are supported
	@OMP_NUM_THREADS=1 .oldest/bin/python -m pytest $(OLDEST:%=tests/test_%.py)

clean: ## remove virtual environments and build products
	rm -rf .venv .oldest build dist _docs *.egg-info
