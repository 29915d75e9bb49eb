# Two commands work on a fresh machine with python3 and its venv module: `make demo` and `make test`.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
FIGURES := $(CURDIR)/outputs/stress.jsonl
FACTS := settings.ini setup.py pyproject.toml
KIND := requirements/$(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c 'import platform, sys; print("python%d.%d-%s-%s.txt" % (*sys.version_info[:2], sys.platform, platform.machine()))' 2>/dev/null)
LOCK ?= $(wildcard $(KIND))  # the lock file for this Python and machine, if there is one; make LOCK= … installs the newest versions
OLDEST := golden_model golden_parts rivals segmenter evaluation metrics protocol resume explore errors

.PHONY: help demo bench gpu test stress lint export docs readme picture trained lock wheel audit oldest clean
.DEFAULT_GOAL := help

help: ## list all commands
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "mbs needs Python 3.10 or newer: call make with PYTHON=/path/to/python3.10"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3 cannot create virtual environments here: on Debian or Ubuntu run apt-get install python3-venv"; exit 2; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/made $(FACTS) $(LOCK)
	@echo "Installing mbs and its requirements into .venv, $(or $(LOCK:%=with the versions in %),in the newest versions) (several minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(LOCK:%=-c %) -e .
	@touch $@

.venv/developer: .venv/made $(FACTS) $(LOCK)
	@echo "Installing mbs with its developer tools into .venv, $(or $(LOCK:%=with the versions in %),in the newest versions) (several minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(LOCK:%=-c %) -e '.[dev,pretrained,cluster,app]'
	@touch $@ .venv/installed

bench: .venv/developer ## run every benchmark and write ratios to a plain eager composition to benchmarks/RESULTS.md
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

gpu: .venv/developer ## check and measure everything on a GPU, and write benchmarks/GPU.md (8 minutes); REHEARSE=1 tries the code on a CPU
	@$(BIN)/python benchmarks/gpu.py $(if $(REHEARSE),--rehearse)

demo: .venv/installed ## train three methods on generated scenes and compare them
	@$(BIN)/mbs demo

test: .venv/developer ## run every test, JOBS at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

stress: .venv/developer ## run the full stress test (an hour or two on two cores) and write its figures to docs/stress.md
	@rm -f $(FIGURES)
	@MBS_FIGURES=$(FIGURES) MBS_KILLS=40 MBS_BATCH_KILLS=40 MBS_NOTEBOOK_KILLS=12 MBS_EVERY_KILL=1 MBS_NOTEBOOK_SAVES=6 MBS_FAULTS=90 MBS_MUTATIONS=250 MBS_CAMPAIGN=1160 MBS_LONG=3 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -o timeout=0 -n $(JOBS) --dist loadgroup $$(grep -l "from figures import kept" tests/test_*.py)
	@$(BIN)/python docs/stress.py $(FIGURES)

lint: .venv/developer ## style and format of code and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

export: .venv/developer ## clean the notebooks and export the package from them
	@$(BIN)/nbdev-clean && $(BIN)/nbdev-export && $(BIN)/ruff format -q mbs
	@touch .venv/installed .venv/developer  # nbdev writes pyproject.toml anew

docs: .venv/developer ## build the documentation site, _docs/html/index.html
	@$(BIN)/python docs/build.py && echo "_docs/html/index.html"

readme: .venv/developer ## make README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

picture: .venv/installed ## make the picture of README.md from the runs of make demo
	@$(BIN)/python docs/picture.py

trained: .venv/installed ## train the small runs in nbs/trained that the notebooks show
	@$(BIN)/python nbs/trained/train.py

lock: .venv/developer ## write the installed versions to requirements/; for the newest versions run make clean and make lock LOCK=
	@{ echo "# Every package of the developer environment; made by make lock"; $(BIN)/python -m pip freeze --all --exclude pip --exclude mbs; } > $(KIND)
	@$(BIN)/python docs/dependencies.py
	@touch .venv/installed .venv/developer && echo $(KIND)

wheel: .venv/developer ## build dist/: sdist, wheel, and a bill of materials of all that is installed with it (CycloneDX)
	@rm -rf dist && $(BIN)/python -m build --no-isolation -o dist . > /dev/null && $(BIN)/python docs/bill.py dist

audit: ## look up known vulnerabilities of the locked versions (asks the advisory database of PyPI)
	@$(PYTHON) -m venv .audit && .audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	@.audit/bin/pip-audit --no-deps --disable-pip -r $(KIND)

# Exactly the lower bounds of settings.ini.
.oldest/made: $(FACTS)
	@$(PYTHON) -m venv .oldest
	@sed -nE 's/^ +([a-z0-9-]+)(\[[a-z]+\])?>=([0-9.]+).*/\1==\3/p' settings.ini > .oldest/constraints.txt
	@echo "Installing the oldest releases that mbs supports into .oldest (several minutes the first time)"
	@.oldest/bin/python -m pip install -q --disable-pip-version-check -c .oldest/constraints.txt -e '.[pretrained]' pytest pytest-timeout hypothesis scikit-learn
	@touch $@

oldest: .oldest/made ## test all computations with the oldest supported releases
	@OMP_NUM_THREADS=1 .oldest/bin/python -m pytest $(OLDEST:%=tests/test_%.py)

clean: ## remove virtual environments and build products
	rm -rf .venv .oldest .audit build dist _docs *.egg-info
