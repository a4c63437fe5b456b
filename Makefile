# `make test` and `make demo` need nothing but python3 (>= 3.10): each sets up .venv on its first run.
.DEFAULT_GOAL := help
BIN := .venv/bin

.PHONY: help setup lint test demo pretrain-nano wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup:  ## create .venv with pinned requirements and build the package into it
	@bash scripts/bootstrap.sh

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, types and the whole test suite
	$(BIN)/pytest

demo: setup  ## run the whole method at nano scale and write a report
	$(BIN)/subspace3d demo --out runs/demo

pretrain-nano: setup  ## pre-train vggt-nano from scratch (about 90 minutes on two cores; resumes)
	$(BIN)/python scripts/pretrain_nano.py --out runs/pretrain

wheel: setup  ## sdist and wheel into dist/, tried in fresh environments (docs/wheels.md)
	bash scripts/build_wheel.sh
	bash scripts/check_wheel.sh

clean:  ## remove everything that was built
	rm -rf build dist .venv
