# shellcheck shell=bash
# The whole environment of a run on Neuron, with the reason for each variable. node.sh sources this file. A
# variable that is set already keeps its value. Sources, read in November 2026: the AWS Neuron documentation
# (pages by name), the scripts of neuronx-distributed 0.18 ("NxD":
# examples/training/llama/tp_zero1_llama_hf_pretrain/tp_zero1_llama3_8B_hf_pretrain.sh) and of optimum-neuron.
# None of this has run on Trainium.

# A virtual environment that has the Neuron SDK, unless one is active. The second line is where neuron-ls is.
# shellcheck disable=SC1091
[[ -z ${VENV:-} ]] || . "$VENV/bin/activate"
export PATH="$PATH:/opt/aws/neuron/bin"

# The compiler's flags ("Neuron Compiler CLI Reference Guide"). model-type: optimisations for transformers.
# enable-saturate-infinity: on trn1, a transpose of infinities (a mask) by a matrix product may otherwise give
# NaN. auto-cast=none: fp32 products stay fp32; this is the default of SDK 2.27 and later, not of earlier
# ones. Left out on purpose: --distribution-strategy=llm-training, which must not be combined with NKI kernels
# ("NxD Training release notes", 04/03/2025); --cache_dir, which would win over the variable below.
cc_flags="--model-type=transformer --enable-saturate-infinity --auto-cast=none"
# 64-bit integers: compilers before 2.27 (SDK 2.32) compute them in 32 bits, and markstep was written for
# that: its integers are ids, positions and lengths. 2.27 has two flags for it, and announces that the next
# release computes them in 64 bits on trn2, 20 to 30 % slower, and refuses integer sums over ranks, products and
# powers, of which markstep's graphs have none ("Neuron Compiler release notes", 08/17/2026). These values keep
# what was. Older compilers do not know the flags.
if [[ $(neuronx-cc --version 2>&1) =~ Compiler\ version\ 2\.([0-9]+)\. ]] && (( BASH_REMATCH[1] >= 27 )); then
    cc_flags+=" --native-int64=disabled --implicit-integer-downcast=all"
fi
: "${NEURON_CC_FLAGS=$cc_flags}"
unset cc_flags

# Compiled graphs ("Neuron Persistent Cache"): a directory that all nodes see, or s3://BUCKET/PATH. The SDK's
# default, /var/tmp/neuron-compile-cache, is each node's own, and is not shipped with the training package.
: "${NEURON_COMPILE_CACHE_URL=$PWD/neuron_cache}"

# The compiler's own softmax instead of its parts ("PyTorch NeuronX Environment Variables"; NxD).
: "${NEURON_FUSE_SOFTMAX=1}"

# glibc keeps up to 8 heaps a core for threads. Hosts with 32 processes of many threads ran out of memory,
# mostly while saving (NxD and optimum-neuron: "Host OOM"; the tutorial: "don't remove it for now").
: "${MALLOC_ARENA_MAX=64}"

# The number of executions that may be queued ("NeuronX Runtime Configuration"; NxD takes 3). With the
# default, 0, the host waits for each. The loop reads its values one step late, and only with this variable is
# it ahead of the device. From SDK 2.31 on, the runtime ignores the variable with a warning.
: "${NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS=3}"

export NEURON_CC_FLAGS NEURON_COMPILE_CACHE_URL NEURON_FUSE_SOFTMAX MALLOC_ARENA_MAX
export NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS

# Several nodes communicate over EFA, by RDMA from device memory ("How to prepare trn1.32xlarge for multi-node
# execution"). node.sh knows the number of nodes.
if (( ${nodes:-1} > 1 )); then
    : "${FI_PROVIDER=efa}" "${FI_EFA_USE_DEVICE_RDMA=1}"
    export FI_PROVIDER FI_EFA_USE_DEVICE_RDMA
fi

# Every process has sockets to many others: "Too many open files when running training job" ("PyTorch NeuronX
# troubleshooting").
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# Not set, on purpose:
# NEURON_RT_STOCHASTIC_ROUNDING_EN    trainer/main.py sets it with --stochastic_rounding. Without that flag it
#                                     takes it away: master weights are fp32.
# XLA_USE_BF16, XLA_DOWNCAST_BF16     set in the tutorial. By them torch_xla 2.9 still makes bf16 of all that is
#                                     fp32, master weights and the loss too. trainer/main.py takes them away,
#                                     says so, and reads them as --bf16: bf16 weights, fp32 master weights. It
#                                     takes away others, too (parallel/runtime/variables.py).
# NEURON_RT_ROOT_COMM_ID              torch-neuronx derives it from torchrun's MASTER_ADDR and port 62182.
# NEURON_RT_NUM_CORES, _VISIBLE_CORES torch-neuronx gives each process of torchrun its core.
# FI_EFA_FORK_SAFE                    only for Amazon Linux 2, whose glibc is too old for PyTorch 2.9.
# CCOM_SOCKET_IFNAME                  NxD sets eth0 in pods whose first interface is another. Set it in the
#                                     files of tools/launch/kubernetes where nodes do not find each other.
# BUCKET_CAP_MB and its kin           torch_xla's and NxD's bucketing. markstep's buckets are of 128 MB
#                                     (parallel/buckets.py).
