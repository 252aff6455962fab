#!/usr/bin/env bash
# One machine's part of a run: node.sh precompile|train FLAGS. trn1.sh starts it, slurm.sbatch on every node,
# and the job files of tools/launch/kubernetes in every pod.
#   NPROC_PER_NODE   processes on this machine; default 32, the NeuronCores of a trn1.32xlarge
#   RECIPE           a file of flags that come before FLAGS, which win; default: the tutorial's job.
#                    RECIPE=/dev/null: FLAGS alone.
#   VENV             a virtual environment to activate
set -euo pipefail
trap '' USR2       # Slurm sends it; ignored until the ranks can take it, see below
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Who started the run, on how many nodes, and where they meet.
launcher=none nodes=1 meet=()
if [[ -n ${SLURM_STEP_NODELIST:-} ]]; then
    launcher=slurm nodes=${SLURM_STEP_NUM_NODES:-1}
    # The nodes of the step, not of the job: they differ after a node was replaced. The first of
    # ip-10-0-[7-9,12] is ip-10-0-7.
    first=$(sed -E 's/\[([0-9]+)[^]]*\]/\1/g; s/,.*//' <<< "$SLURM_STEP_NODELIST")
    meet=(--nnodes "$nodes" --node_rank "$SLURM_NODEID" --master_addr "$first"
          --master_port $((20000 + SLURM_JOB_ID % 10000)))
elif [[ -n ${KUBERNETES_SERVICE_HOST:-} && -n ${MASTER_ADDR:-} ]]; then
    # Kubeflow's training operator: RANK and WORLD_SIZE are those of pods.
    launcher=kubernetes nodes=${PET_NNODES:-$WORLD_SIZE}
    if [[ ! $nodes =~ ^[0-9]+$ ]]; then
        echo "error: $nodes pods: a fixed number was expected, so leave elasticPolicy out of the job" >&2
        exit 1
    fi
    meet=(--nnodes "$nodes" --node_rank "$RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    unset RANK WORLD_SIZE
fi
# shellcheck source=tools/launch/neuron_env.sh
. tools/launch/neuron_env.sh

phase=$1 cores=${NPROC_PER_NODE:-32}
mapfile -t recipe < <(sed 's/#.*//' "${RECIPE:-trainer/presets/dolly-llama3-8b.txt}" | xargs -rn 1)
flags=("${recipe[@]}" "${@:2}")
python -m tools.preflight --phase "$phase" --nproc_per_node "$cores" --nnodes "$nodes" "${flags[@]}"

# A module, not a file: it is found in this directory, or where markstep is installed.
command=(torchrun --nproc_per_node "$cores" "${meet[@]}" -m trainer.main "${flags[@]}")

if [[ $phase == precompile ]]; then
    # Ten steps whose graphs are collected and compiled, not run. Their output is garbage, and is removed.
    dummy=$(mktemp -d)
    trap 'rm -rf "$dummy"' EXIT
    neuron_parallel_compile "${command[@]}" --max_steps 10 --output_dir "$dummy"
elif [[ $launcher == none ]]; then
    exec "${command[@]}"
else
    # torchrun forwards SIGTERM and kills after 30 s, too early for a large model's checkpoint. So this script
    # sends SIGTERM to torchrun's children, the ranks, which save and end. Slurm asks for it by SIGUSR2, which
    # torchrun ignores; at its own end of the job it sends SIGTERM, which torchrun handles. Kubernetes sends
    # SIGTERM, to this script alone.
    said=$(mktemp)
    exec {output}> >(trap '' TERM; exec tee "$said")
    tee=$!
    (trap '' USR2; exec "${command[@]}" {output}>&-) >&"$output" &
    torchrun=$!
    exec {output}>&-
    save=(pkill -TERM -P "$torchrun")
    trap '"${save[@]}" || true' USR2
    if [[ $launcher == slurm ]]; then trap : TERM; else trap '"${save[@]}" || true' TERM; fi
    # A signal ends wait early.
    while wait $torchrun && status=0 || status=$?; kill -0 $torchrun 2> /dev/null; do :; done
    wait "$tee" || true
    # A pod that ended well is not started again, so the pods of a run that was stopped end with an error.
    if [[ $launcher == kubernetes && $status == 0 ]] && grep -q "stopped after step" "$said"; then
        status=75
    fi
    rm "$said"
    exit "$status"
fi
