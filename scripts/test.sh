#!/usr/bin/env bash
# Set-up, lint, types, tests and docs, one after the other; stops at the first that fails and says how long each took.
#
#   bash scripts/test.sh [PYTEST_ARGUMENT ...]
#
# WORKERS is the number of pytest's processes (2): a worker holds about 1 GiB.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
times=()

report() { printf '\ntook'; printf '  %s' "${times[@]}"; printf '\n'; }
trap report EXIT

part() {
  local name=$1 start=$SECONDS status=0
  shift
  "$@" || status=$?
  times+=("$name $((SECONDS - start)) s")
  return $status
}

lint() { $bin/ruff check . && $bin/ruff format --check .; }

part set-up bash scripts/bootstrap.sh
part lint lint
part types bash scripts/types.sh
# One file, one worker: files share what their fixtures made, and there is one browser at a time. A worker that had to be
# ended is not replaced: it would be given the same test again and again.
part tests $bin/pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
  -o faulthandler_timeout=660 "$@"
part docs make --no-print-directory docs
