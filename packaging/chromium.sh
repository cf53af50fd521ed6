#!/usr/bin/env bash
# The test of the UI needs a Chromium: one that is there, or, for root on Debian, its package. Else that test skips itself
# and says so; it is the test that decides, so this script never fails.
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  log=$(mktemp)
  printf '  … chromium, for the test of the UI\n'
  if (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) >"$log" 2>&1; then
    printf '  ✓ chromium\n'
  else
    printf '  ✗ chromium could not be installed; the test of the UI will say so. The end of %s:\n' "$log"
    tail -n 3 "$log"
  fi
fi
exit 0
