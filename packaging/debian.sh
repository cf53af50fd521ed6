#!/usr/bin/env bash
# What some tests need of Debian's packages, for root on Debian. Elsewhere those tests skip themselves and say so; it is
# the tests that decide, so this script never fails.
export PATH="$PATH:/usr/sbin"

# need COMMAND WHAT PACKAGE…: installs the packages unless COMMAND is there.
need() {
  local command="$1" what="$2" log policy=/usr/sbin/policy-rc.d
  shift 2
  if command -v "$command" >/dev/null 2>&1; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then return; fi
  log=$(mktemp)
  printf '  … %s, for tests\n' "$what"
  # The packages' services are not started: tests start daemons of their own.
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
  else
    policy=
  fi
  if (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@") >"$log" 2>&1; then
    printf '  ✓ %s\n' "$what"
  else
    printf '  ✗ %s could not be installed; its tests will say so. The end of %s:\n' "$what" "$log"
    tail -n 3 "$log"
  fi
  if [ -n "$policy" ]; then rm -f "$policy"; fi
}

# For the Spark engine: Java 17 or later.
if [ -z "$JAVA_HOME" ]; then need java Java default-jre-headless; fi
need slurmctld Slurm slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
exit 0
