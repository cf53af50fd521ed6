#!/usr/bin/env bash
# The tests of the Spark engine need Java 17 or later: one that is there, or, for root on Debian, its package. Else those
# tests skip themselves and say so; so this script never fails.
if command -v java >/dev/null 2>&1 || [ -n "$JAVA_HOME" ]; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  log=$(mktemp)
  printf '  … Java, for the tests of the Spark engine\n'
  if (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends default-jre-headless) >"$log" 2>&1; then
    printf '  ✓ Java\n'
  else
    printf '  ✗ Java could not be installed; the tests of the Spark engine will say so. The end of %s:\n' "$log"
    tail -n 3 "$log"
  fi
fi
exit 0
