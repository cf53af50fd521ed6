#!/usr/bin/env bash
# Bundles what draws the explorer's map (regl-scatterplot, MIT) into twhin_pipeline/serving/explorer/static/vendor/, with
# the licenses of what is in it. Needs npm; without it the map page says that it is missing, and all else works.
# Called by packaging/setup.sh. Nothing is done where the bundle is newer than what it is made from.
set -euo pipefail
cd "$(dirname "$0")/explorer"

OUT=../../twhin_pipeline/serving/explorer/static/vendor
if [ -e "$OUT/scatterplot.js" ] && [ -d node_modules/axe-core ] && [ ! package.json -nt "$OUT/scatterplot.js" ] &&
  [ ! scatterplot.js -nt "$OUT/scatterplot.js" ]; then
  echo "the bundle is there"
  exit 0
fi
if ! command -v npm >/dev/null; then
  echo "npm is not installed (Debian: apt-get install npm), so the explorer's map page is left without its drawing"
  exit 0
fi
if ! npm install --no-package-lock --no-audit --no-fund --ignore-scripts; then
  echo "npm could not install (its messages are above); the explorer's map page is left without its drawing"
  exit 0
fi
mkdir -p "$OUT"
node_modules/.bin/esbuild scatterplot.js --bundle --format=esm --minify --target=es2022 --outfile="$OUT/scatterplot.js"
for package in node_modules/*/ node_modules/@flekschas/*/; do
  case "$package" in node_modules/esbuild/ | node_modules/axe-core/) continue ;; esac
  for license in "$package"LICENSE*; do
    if [ -e "$license" ]; then printf '\n== %s\n\n' "${package#node_modules/}" && cat "$license"; fi
  done
done >"$OUT/LICENSES.txt"
touch "$OUT/scatterplot.js"
