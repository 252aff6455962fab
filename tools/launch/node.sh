#!/usr/bin/env bash
# One machine's part of a run: node.sh precompile|train FLAGS. Started by trn1.sh, and by slurm.sbatch on every node.
#   NPROC_PER_NODE   processes on this machine; default 32, the NeuronCores of a trn1.32xlarge
#   RECIPE           a file of flags that come before FLAGS, which win; default: the tutorial's job. RECIPE=/dev/null: FLAGS alone.
#   VENV             a virtual environment to activate
set -euo pipefail
trap '' USR2       # Slurm's; until the ranks can take it, see below
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/launch/neuron_env.sh
. tools/launch/neuron_env.sh

phase=$1 cores=${NPROC_PER_NODE:-32} nodes=${SLURM_STEP_NUM_NODES:-1}
mapfile -t recipe < <(sed 's/#.*//' "${RECIPE:-trainer/presets/dolly-llama3-8b.txt}" | xargs -rn 1)
flags=("${recipe[@]}" "${@:2}")
python -m tools.preflight --phase "$phase" --nproc_per_node "$cores" --nnodes "$nodes" "${flags[@]}"

command=(torchrun --nproc_per_node "$cores")
if [[ -n ${SLURM_STEP_NODELIST:-} ]]; then
    # The step's nodes, not the job's: after a node was replaced they are others. ip-10-0-[7-9,12] starts with ip-10-0-7.
    first=$(sed -E 's/\[([0-9]+)[^]]*\]/\1/g; s/,.*//' <<< "$SLURM_STEP_NODELIST")
    command+=(--nnodes "$nodes" --node_rank "$SLURM_NODEID" --master_addr "$first" --master_port $((20000 + SLURM_JOB_ID % 10000)))
fi
command+=(trainer/main.py "${flags[@]}")

if [[ $phase == precompile ]]; then
    # Ten steps whose graphs are collected and compiled, not run. What they write has no meaning, and goes away.
    dummy=$(mktemp -d)
    trap 'rm -rf "$dummy"' EXIT
    neuron_parallel_compile "${command[@]}" --max_steps 10 --output_dir "$dummy"
elif [[ -z ${SLURM_STEP_NODELIST:-} ]]; then
    exec "${command[@]}"
else
    # torchrun passes SIGTERM on and kills after 30 s, too early for a large model's checkpoint. So Slurm is asked to send SIGUSR2,
    # which torchrun ignores, and its children get SIGTERM from here. On SIGTERM itself, Slurm's own end, torchrun knows what to do.
    (trap '' USR2; exec "${command[@]}") &
    trap 'pkill -TERM -P $! || true' USR2
    trap : TERM
    while wait $! && status=0 || status=$?; kill -0 $! 2> /dev/null; do :; done     # a signal ends wait early
    exit "$status"
fi
