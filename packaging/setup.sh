#!/usr/bin/env bash
# Makes .venv: a virtual environment with the pinned dependencies and this package, editable.
#   VARIANT          cpu (default) or gpu
#   PYTHON           the interpreter to use; left out, the newest of python3.13 … python3 that runs and is 3.11 to 3.13
#   TORCH_INDEX_URL  the package index for torch alone; left out, pip's own
# Called by `make setup`, which keeps it from running twice.
set -euo pipefail
cd "$(dirname "$0")/.."

VARIANT="${VARIANT:-cpu}"
VENV=.venv
LOG="$VENV/setup.log"
CONSTRAINTS="constraints/$VARIANT.txt"

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ -f "$CONSTRAINTS" ] || fail "VARIANT=$VARIANT is unknown; take one of: $(cd constraints && ls ./*.txt | sed 's|^\./||; s/\.txt$//' | tr '\n' ' ')"

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

pick_python() {
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON does not run, is not 3.11 to 3.13, or lacks the venv module"
    printf '%s' "$PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3; do
    # A name may be there and not run (a version manager's shim), so each is tried.
    if fits "$candidate"; then printf '%s' "$candidate"; return; fi
  done
  fail "no Python 3.11 to 3.13 with the venv module was found; install one (Debian: apt-get install python3-venv) or pass PYTHON=/path/to/python"
}

# step TEXT COMMAND…: one line while it runs and one when it is done; all output goes to the log.
step() {
  local text="$1" started=$SECONDS pid shown
  shift
  printf '\n## %s\n' "$text" >>"$LOG"
  "$@" >>"$LOG" 2>&1 &
  pid=$!
  if [ -t 1 ]; then
    while kill -0 "$pid" 2>/dev/null; do
      shown=$(grep -oE '^(Collecting|Downloading|Building|Installing collected).{0,50}' "$LOG" | tail -n 1 || true)
      printf '\r\033[K  … %s, %d s  %s' "$text" $((SECONDS - started)) "$shown"
      sleep 1
    done
    printf '\r\033[K'
  else
    printf '  … %s\n' "$text"
  fi
  if ! wait "$pid"; then
    printf '  ✗ %s, after %d s. The end of %s:\n\n' "$text" $((SECONDS - started)) "$LOG" >&2
    tail -n 25 "$LOG" >&2
    printf '\nMend the cause and run `make setup` again; `make clean-venv` starts afresh.\n' >&2
    exit 1
  fi
  printf '  ✓ %s (%d s)\n' "$text" $((SECONDS - started))
}

# Both builds of fbgemm install into one folder, so another variant gets an environment of its own.
if [ -e "$VENV" ]; then
  had=$(cat "$VENV/variant" 2>/dev/null || printf '%s' "$VARIANT")
  if [ "$had" != "$VARIANT" ]; then
    printf '  %s holds the %s variant: making it anew\n' "$VENV" "$had"
    rm -rf "$VENV"
  elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    printf '  %s does not run here: making it anew\n' "$VENV"
    rm -rf "$VENV"
  fi
fi

if [ ! -e "$VENV/bin/python" ]; then
  python=$(pick_python)
  mkdir -p "$VENV"
  step "environment in $VENV with $("$python" --version 2>&1)" "$python" -m venv "$VENV"
fi
printf '%s\n' "$VARIANT" >"$VENV/variant"

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
torch=$(grep -E '^torch==' "$CONSTRAINTS")
index=()
[ -z "${TORCH_INDEX_URL:-}" ] || index=(--index-url "$TORCH_INDEX_URL")

# torch first and by itself: its index may be another one.
step "$torch ($VARIANT)" pip install "${index[@]}" "$torch"
# The build backend comes pinned too, hence no build isolation below.
step "build backend" pip install -c "$CONSTRAINTS" hatchling editables
if [ "$VARIANT" = gpu ]; then
  step "everything else, pinned by $CONSTRAINTS" pip install --no-build-isolation -c "$CONSTRAINTS" -e '.[dev,docs]'
else
  step "everything else, pinned by $CONSTRAINTS" \
    pip install --no-build-isolation -c "$CONSTRAINTS" ./packaging/fbgemm-gpu -e '.[dev,docs]'
fi
step "check of what was installed" pip check
step "drawing of the explorer's map" packaging/explorer.sh
[ -e twhin_pipeline/serving/explorer/static/vendor/scatterplot.js ] || printf '    left out: %s\n' "$(tail -n 1 "$LOG")"
