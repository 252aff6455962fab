#!/usr/bin/env bash
# One machine's part of a run: node.sh precompile|train FLAGS. trn1.sh starts it, and slurm.sbatch on every
# node.
#   NPROC_PER_NODE   processes on this machine; default 32, the NeuronCores of a trn1.32xlarge
#   RECIPE           a file of flags that come before FLAGS, which win; default: the tutorial's job.
#                    RECIPE=/dev/null: FLAGS alone.
#   VENV             a virtual environment to activate
set -euo pipefail
trap '' USR2       # Slurm sends it; ignored until the ranks can take it, see below
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/launch/neuron_env.sh
. tools/launch/neuron_env.sh

phase=$1 cores=${NPROC_PER_NODE:-32} nodes=${SLURM_STEP_NUM_NODES:-1}
mapfile -t recipe < <(sed 's/#.*//' "${RECIPE:-trainer/presets/dolly-llama3-8b.txt}" | xargs -rn 1)
flags=("${recipe[@]}" "${@:2}")
python -m tools.preflight --phase "$phase" --nproc_per_node "$cores" --nnodes "$nodes" "${flags[@]}"

command=(torchrun --nproc_per_node "$cores")
if [[ -n ${SLURM_STEP_NODELIST:-} ]]; then
    # The nodes of the step, not of the job: they differ after a node was replaced. The first of
    # ip-10-0-[7-9,12] is ip-10-0-7.
    first=$(sed -E 's/\[([0-9]+)[^]]*\]/\1/g; s/,.*//' <<< "$SLURM_STEP_NODELIST")
    port=$((20000 + SLURM_JOB_ID % 10000))
    command+=(--nnodes "$nodes" --node_rank "$SLURM_NODEID" --master_addr "$first" --master_port "$port")
fi
command+=(trainer/main.py "${flags[@]}")

if [[ $phase == precompile ]]; then
    # Ten steps whose graphs are collected and compiled, not run. Their output is garbage, and is removed.
    dummy=$(mktemp -d)
    trap 'rm -rf "$dummy"' EXIT
    neuron_parallel_compile "${command[@]}" --max_steps 10 --output_dir "$dummy"
elif [[ -z ${SLURM_STEP_NODELIST:-} ]]; then
    exec "${command[@]}"
else
    # torchrun forwards SIGTERM and kills after 30 s, too early for a large model's checkpoint. So Slurm sends
    # SIGUSR2, which torchrun ignores, and this script sends SIGTERM to torchrun's children. At its own end of
    # the job Slurm sends SIGTERM, which torchrun handles.
    (trap '' USR2; exec "${command[@]}") &
    trap 'pkill -TERM -P $! || true' USR2
    trap : TERM
    while wait $! && status=0 || status=$?; kill -0 $! 2> /dev/null; do :; done     # a signal ends wait early
    exit "$status"
fi
