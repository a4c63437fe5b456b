#!/usr/bin/env bash
# Makes .venv ready to build, test and run the project; does nothing where it already is. Called by the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
python=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  || fail "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"

# ---- system packages -------------------------------------------------------------------------------------------------
missing=()
libraries=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)
need_library() { grep -qF "$1" <<<"$libraries" || missing+=("$2"); }
# Open3D's wheel links these and does not carry them.
need_library libusb-1.0.so.0 libusb-1.0-0
need_library libGL.so.1 libgl1
need_library libgomp.so.1 libgomp1
need_library libX11.so.6 libx11-6
command -v c++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
  || missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ]; then
  install="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]}"
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}") \
      >/tmp/subspace3d-apt.log 2>&1 || fail "apt-get failed, see /tmp/subspace3d-apt.log"
  else
    fail "system packages are missing; run as root:  $install"
  fi
fi

# ---- Python packages -------------------------------------------------------------------------------------------------
[ -x $venv/bin/python ] || { say "creating $venv; about 4 GB and 5 minutes until it is ready"; "$python" -m venv $venv; }
pip() { $venv/bin/python -m pip --disable-pip-version-check "$@"; }

install_torch() {
  local torch_pin plan
  torch_pin=$(grep '^torch==' requirements-dev.txt)
  $venv/bin/python -c "import importlib.metadata as m; assert m.version('torch').split('+')[0] == '${torch_pin#torch==}'" \
    2>/dev/null && return
  if ! { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then
    # Without a GPU the default Linux wheel would pull gigabytes of CUDA libraries; ask what pip would take first,
    # because a machine may already be set up with a CPU build.
    plan=$(pip install --dry-run --quiet --report - "$torch_pin" 2>/dev/null || true)
    if [[ $plan == *'"name": "nvidia-'* ]]; then
      say "installing the CPU build of $torch_pin"
      pip install --quiet --retries 1 --index-url https://download.pytorch.org/whl/cpu "$torch_pin" && return
      say "the index of CPU builds cannot be reached; taking the default build, which is several gigabytes"
    fi
  fi
  say "installing $torch_pin"
  pip install --quiet "$torch_pin"
}

wanted=$(cat requirements-dev.txt scripts/bootstrap.sh | sha256sum | cut -c1-16)
if [ ! -e "$venv/.requirements-$wanted" ]; then
  pip install --quiet --upgrade 'pip>=23.1'
  install_torch
  say "installing requirements-dev.txt (a few minutes the first time)"
  pip install --quiet -r requirements-dev.txt
  # it pins numpy<2 and libraries of its application; the tests use its network alone
  pip install --quiet --no-deps depth-anything-3==0.1.1
  rm -f $venv/.requirements-*
  touch "$venv/.requirements-$wanted"
fi

# Mitsuba's fast CPU variant needs an LLVM library; the wheel in requirements-dev.txt exists for x86-64 Linux only.
if ! compgen -G "$venv/lib/libLLVM*.so*" >/dev/null && ! grep -qE 'libLLVM[-.](so\.)?(1[6-9]|2[0-9])' <<<"$libraries"; then
  if [ "$(id -u)" = 0 ] && command -v apt-cache >/dev/null; then
    llvm=$(apt-cache search --names-only '^libllvm(1[6-9]|2[0-9])(t64)?$' | awk '{print $1}' | sort -V | tail -1)
    [ -z "$llvm" ] || { say "installing $llvm"; apt-get install -y --no-install-recommends "$llvm" >/dev/null 2>&1 || true; }
  else
    say "no LLVM found: scenes render with Mitsuba's slow scalar variant (apt-get install libllvm19 brings it)"
  fi
fi

# The browser test of the report needs Chromium; without it that test says so and is skipped. Tried once.
if ! { command -v chromium && command -v chromedriver; } >/dev/null && [ ! -e "$venv/.browser-tried" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing chromium for the browser test of the report"
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver) \
      >/tmp/subspace3d-apt.log 2>&1 || say "chromium cannot be installed here, so the browser test is skipped"
  else
    say "no chromium: the browser test of the report is skipped (apt-get install chromium chromium-driver brings it)"
  fi
  touch "$venv/.browser-tried"
fi

# ---- the project itself ----------------------------------------------------------------------------------------------
# Editable: Python edits count at once. Built anew when the native sources or the build files change, and when Python
# files come, go or move, since the installed package knows them by name.
built=$( (cat pyproject.toml CMakeLists.txt; find csrc -type f | LC_ALL=C sort | xargs cat; echo "${SUBSPACE_CUDA:-AUTO}"
  find python subspace_ext -name '*.py' | LC_ALL=C sort) | sha256sum | cut -c1-16)
if [ ! -e "$venv/.built-$built" ]; then
  say "building the native module"
  pip install --quiet --no-build-isolation --no-deps --editable .
  rm -f $venv/.built-*
  touch "$venv/.built-$built"
fi
