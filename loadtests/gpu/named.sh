# shellcheck shell=bash
# For the scripts beside it, which source it: their options, and whether a measurement is asked for.
DRY=
if [ "${1:-}" = --dry-run ]; then DRY=$1; shift; fi
ONLY=" $* "
failed=0

# asked NAME: without names on the command line all are.
asked() { [[ "$ONLY" = "  " || "$ONLY" = *" $1 "* ]]; }
