#!/usr/bin/env bash
# Run a command in a container with all Neuron devices of this machine: docker.sh IMAGE COMMAND. This
# directory is mounted over the image's /markstep, so that neuron_cache and outputs stay.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
options=(--rm --init --net=host --ipc=host --ulimit nofile=65536:65536 --volume "$PWD:/markstep"
         --volume "${HF_HOME:-$HOME/.cache/huggingface}:/huggingface" --env HF_HOME=/huggingface)
for device in /dev/neuron[0-9]*; do
    [[ ! -e $device ]] || options+=("--device=$device")
done
# A variable without a value is passed as it is set here, or not at all. A cache in a directory of this
# machine is not passed: the container does not see it.
for name in PHASE NPROC_PER_NODE RECIPE HF_TOKEN PJRT_DEVICE NEURON_CC_FLAGS; do
    options+=(--env "$name")
done
[[ ${NEURON_COMPILE_CACHE_URL:-} != s3://* ]] || options+=(--env NEURON_COMPILE_CACHE_URL)
exec docker run "${options[@]}" "$@"
