#!/usr/bin/env bash
# mypy over the packages, mypy --strict and pyright over the examples: side by side, what each says one after the other.
#
#   bash scripts/types.sh
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
logs=$(mktemp -d)
trap 'rm -r "$logs"' EXIT

$bin/mypy >"$logs/mypy" 2>&1 & jobs=($!)
if [ -d examples ]; then
  # with other settings in one cache mypy would read everything again, each time
  $bin/mypy --strict --cache-dir .mypy_cache/strict examples >"$logs/mypy --strict examples" 2>&1 & jobs+=($!)
  $bin/basedpyright examples >"$logs/basedpyright examples" 2>&1 & jobs+=($!)
fi
status=0
for job in "${jobs[@]}"; do wait "$job" || status=1; done
for log in "$logs"/*; do
  echo "$(basename "$log"): $(cat "$log")"
done
exit $status
