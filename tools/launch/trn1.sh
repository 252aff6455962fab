#!/usr/bin/env bash
# A run on one trn1.32xlarge, in the tutorial's two phases: ten steps under neuron_parallel_compile, then the
# training.
#     tools/launch/trn1.sh [FLAGS of trainer/main.py]
# Without FLAGS it is the tutorial's job. PHASE=precompile or PHASE=train: that phase alone. node.sh lists
# more variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${PHASE:-all} in
    all) tools/launch/node.sh precompile "$@"; exec tools/launch/node.sh train "$@" ;;
    precompile | train) exec tools/launch/node.sh "$PHASE" "$@" ;;
    *) echo "error: PHASE=$PHASE: precompile or train was expected, or none for both" >&2; exit 1 ;;
esac
