# `make test` and `make demo` need nothing but python3 (>= 3.11): each sets up .venv on its first run.
.DEFAULT_GOAL := help
BIN := .venv/bin

.PHONY: help setup lint test docs fuzz faults sanitize demo experiments pretrain-nano wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup:  ## create .venv with pinned requirements (4 GB, about 5 minutes) and build the package into it; as root installs apt packages too
	@bash scripts/bootstrap.sh

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	bash scripts/types.sh

test:  ## lint, types, the whole test suite on two cores (WORKERS=N) and the docs; says how long each took
	@bash scripts/test.sh

docs: setup  ## the documentation site into build/docs; warnings and broken links are errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs

fuzz: setup  ## damaged files for every reader, 2000 each (about half an hour on one core), then coverage-guided if atheris is there
	$(BIN)/pytest tests/fuzz --slow --fuzz-cases 2000

faults: setup  ## kill, starve and damage every stage
	$(BIN)/pytest tests/faults --slow

sanitize: setup  ## the tests of the native code under AddressSanitizer and UBSan
	bash scripts/sanitize.sh

demo: setup  ## run the whole method at nano scale and write a report
	$(BIN)/subspace3d demo --out runs/demo

experiments: setup  ## the paper's tables and the directions at nano scale (each about 3 hours on two cores; resumes), into docs
	$(BIN)/python -m experiments --out runs/experiments --publish .
	$(BIN)/python -m experiments.directions --out runs/experiments --publish .

pretrain-nano: setup  ## pre-train vggt-nano from scratch (about a day on one core; resumes)
	$(BIN)/python -m experiments.pretraining --out runs/pretrain --threads 1 --workers 1

wheel: setup  ## sdist and wheel into dist/, tried in fresh environments (docs/wheels.md)
	bash scripts/build_wheel.sh
	bash scripts/check_wheel.sh

clean:  ## remove everything that was built
	rm -rf build dist .venv
