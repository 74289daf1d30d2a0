# `make repro` regenerates every table of the demo, `make test` runs the checks, `make paper-plan` and `make paper` are for paper scale. All make their own environment first.
FIT := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(FIT)' 2>/dev/null && echo $$p && exit; done; echo python3)
BIN := .venv/bin
READY := .venv/.ready
export DVC_NO_ANALYTICS := 1
export PYTHONHASHSEED := 0

.PHONY: repro test paper paper-plan setup lock expected clean

repro: setup
	$(BIN)/fpl repro

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fpl
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=6 fpl tests
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# paper scale: what it needs, and how long it takes; then, if nothing is missing, all of it (a second call goes on)
paper-plan: setup
	cd paper && ../$(BIN)/fpl plan

paper: setup
	cd paper && ../$(BIN)/fpl plan --check && ../$(BIN)/fpl repro

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "fpl needs Python 3.11 to 3.13; this is %d.%d: call make PYTHON=python3.12" % v)'
	@echo "installing into .venv (about 6 GB on Linux, two minutes) ..."
	@rm -f $(READY)
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@[ -e .git ] || $(BIN)/dvc config --local core.no_scm true
	@touch $(READY)

# for developers: resolve requirements.in again (needs uv); take over fresh results as the expected ones
lock:
	uv pip compile requirements.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements.txt

expected:
	$(BIN)/fpl accept

clean:
	rm -rf data/shapes data/styles data/features results/runs results/notebooks results/tables results/figures results/report results/records dvc.lock
