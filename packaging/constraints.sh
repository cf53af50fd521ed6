#!/usr/bin/env bash
# Writes constraints/cpu.txt from what .venv holds, and constraints/gpu.txt from that: versions only, no hashes, hosts or paths.
set -euo pipefail
cd "$(dirname "$0")/.."
header() {
  printf '# %s\n# Made by `make constraints` from a set that passed every test; ranges stand in pyproject.toml.\n' "$1"
}
frozen=$(.venv/bin/python -m pip --disable-pip-version-check freeze --exclude-editable \
  | grep -E '^[A-Za-z0-9._-]+==' | grep -viE '^(fbgemm[-_]gpu|nvidia-|cuda-|triton)' | sed -E 's/\+[A-Za-z0-9.]+$//' | LC_ALL=C sort -f)
fbgemm=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("fbgemm-gpu").split("+")[0])')
{ header 'The pinned set for machines without CUDA.'; printf '%s\n' "$frozen" "fbgemm-gpu-cpu==$fbgemm"; } >constraints/cpu.txt
{
  header 'The pinned set for CUDA: the same, with the CUDA build of fbgemm. torch pins the NVIDIA packages that it needs itself.'
  printf '%s\n' "$frozen" "fbgemm-gpu==$fbgemm"
} >constraints/gpu.txt
wc -l constraints/*.txt
