# make repro   all tables and figures of the demo      make test   all checks
# make tour    the first trained prompt                make paper  the published settings, on a GPU
# make gpu     what only a GPU can tell, in ten minutes: targets, memory, the best budget of nodes
# Each makes its own environment in .venv first.
FIT := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(FIT)' 2>/dev/null && echo $$p && exit; done; echo python3)
BIN := .venv/bin
LOCKED := .venv/.locked
READY := .venv/.ready
LOG := .venv/install.log
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# the one package without wheels: the lock's own tools build it, and nothing else is built
SOURCE := antlr4-python3-runtime
export DVC_NO_ANALYTICS := 1
# make paper CLUSTER=tcp://host:8786 lets the workers of a Dask cluster do the work
CLUSTER ?=
export FPL_CLUSTER := $(CLUSTER)
export PYTHONHASHSEED := 0

.PHONY: repro test test-cluster fuzz check tour gpu paper paper-plan setup lock expected clean

repro: setup
	$(BIN)/fpl repro

# sweeps with real Dask workers that die, hang and differ, and between two network namespaces (as root)
test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cluster/faults.py tests/cluster/two_hosts.py

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# hostile and damaged input, a minute for each kind that is read; not a part of `make test`
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist load tests/fuzz/targets.py

# what can be said without running anything, two things at a time; pre-commit calls it, too
check: setup
	@$(MAKE) --no-print-directory -j 2 style types copies stripped

.PHONY: style types copies stripped
style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy fpl

copies:
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=6 fpl tests

stripped:
	$(BIN)/nbstripout --verify notebooks/*.ipynb

# from nothing to the first trained prompt and a picture of it
tour: setup
	@$(BIN)/fpl features
	@$(BIN)/fpl notebook notebooks/00_tour.ipynb
	@echo "the tour with its results: results/notebooks/00_tour.ipynb (open it with $(BIN)/jupyter lab)"
	@echo "its picture:               results/tables/00_tour/tour.png"

# one card; a JSON file and a page in results/bench/gpu, named after it
gpu: setup
	$(BIN)/fpl bench gpu

# paper scale: what it needs, and how long it takes; then, if nothing is missing, all of it (a second call goes on)
paper-plan: setup
	cd paper && ../$(BIN)/fpl plan

paper: setup
	cd paper && ../$(BIN)/fpl plan --check && ../$(BIN)/fpl repro

setup: $(READY)

# a change of pyproject.toml installs fpl again, one of the lock everything
$(READY): $(LOCKED) pyproject.toml
	@$(PIP) -qq --no-deps --no-build-isolation -e . >> $(LOG) 2>&1 || { tail -n 30 $(LOG); exit 1; }
	@[ -e .git ] || $(BIN)/dvc config --local core.no_scm true
	@touch $(READY)

$(LOCKED): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "fpl needs Python 3.11 to 3.13; this is %d.%d: call make PYTHON=python3.12" % v)'
	@echo "installing into .venv (about 6 GB on Linux, two minutes) ..."
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python tools/install.py $(LOG) requirements.txt $(PIP) --require-hashes --no-build-isolation --only-binary :all: --no-binary $(SOURCE)
	@touch $(LOCKED)

# for developers: resolve requirements.in again (needs uv); take over fresh results as the expected ones
lock:
	uv pip compile requirements.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements.txt

expected:
	$(BIN)/fpl accept

clean:
	rm -rf data/shapes data/styles data/features results/runs results/notebooks results/tables results/report results/records results/error.txt dvc.lock

# a real federation of three sites on this machine, and its tests with real processes; in an environment of their own
FED := federation/.venv

.PHONY: federation test-federation
federation: $(FED)/.ready
	$(FED)/bin/python -m federation.rehearsal

test-federation: $(FED)/.ready
	OMP_NUM_THREADS=1 $(FED)/bin/python -m pytest -q federation/tests

$(FED)/.ready: federation/requirements.txt federation/pyproject.toml pyproject.toml
	@$(PYTHON) -m venv --clear $(FED)
	@$(FED)/bin/python tools/install.py $(FED)/install.log federation/requirements.txt $(FED)/bin/python -m pip install --disable-pip-version-check --require-hashes --no-build-isolation --only-binary :all:
	@$(FED)/bin/python -m pip install -qq --no-deps --no-build-isolation -e . -e ./federation >> $(FED)/install.log 2>&1
	@touch $(FED)/.ready
