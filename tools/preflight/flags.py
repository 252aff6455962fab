"""What preflight looks at in flags and environment: where they contradict each other, or AWS's software. Pure
functions."""

from collections.abc import Iterator

from parallel.mesh import Mesh
from tools.preflight.checks import Finding, Plan
from tools.preflight.host import Machine

FLASH_TOKENS = 2048  # as in model/attention/flash_nki.py, whose torch may be what is missing here
BUCKET_MB = 140  # more, and neuronx-distributed 0.18 (trainer/trainer.py) knows of NaN in the third step
BUCKET_VARIABLES = (
    "BUCKET_CAP_MB",
    "ALLREDUCE_BUCKET_CAP_MB",
    "ALL_GATHER_REDUCE_SCATTER_BUCKET_CAP_MB",
    "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB",
)
SOURCE_IT = "start with tools/launch/trn1.sh or slurm.sbatch, or `. tools/launch/neuron_env.sh` first"


def topology(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """The world divides into tensor parallel groups, and no variable says that it is another world."""
    try:
        Mesh.create(0, plan.world, plan.config.tensor_parallel_size)
        yield Finding(
            "ok",
            f"{plan.world} ranks: TP{plan.config.tensor_parallel_size} x DP"
            f"{plan.world // plan.config.tensor_parallel_size} on {plan.nnodes} node{'s' * (plan.nnodes > 1)}",
        )
    except ValueError as error:
        yield Finding(
            "error",
            str(error).partition(":")[0],
            f"choose NPROC_PER_NODE ({plan.nproc}), nodes ({plan.nnodes}) and --tensor_parallel_size so that it is",
        )
    if plan.config.world_size and plan.config.world_size != plan.world:
        yield Finding(
            "error",
            f"--world_size {plan.config.world_size}, and {plan.world} processes",
            "leave --world_size out",
        )
    for name, value in (("LOCAL_WORLD_SIZE", plan.nproc), ("WORLD_SIZE", plan.world)):
        if machine.environment.get(name, str(value)) != str(value):
            yield Finding(
                "error",
                f"{name}={machine.environment[name]} is set, and the run will have {value}",
                f"unset {name}: torchrun sets it",
            )
    if not machine.on_neuron:
        return
    visible = machine.environment.get("NEURON_RT_VISIBLE_CORES")
    if visible and (count := count_cores(visible)) != plan.nproc:
        yield Finding(
            "error",
            f"NEURON_RT_VISIBLE_CORES={visible} names {count or 'no'} cores for {plan.nproc} processes",
            f"unset it, or name {plan.nproc}: torch-neuronx gives each process one",
        )
    number = machine.environment.get("NEURON_RT_NUM_CORES")
    if number and number not in ("1", str(plan.nproc)):
        yield Finding(
            "error",
            f"NEURON_RT_NUM_CORES={number}, and {plan.nproc} processes with a core each",
            "unset it: torch-neuronx gives each process its core",
        )


def count_cores(ranges: str) -> int:
    """How many cores a list such as 0-3,8 names; 0 where it is none."""
    count = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            return 0
        count += max(0, int(last or first) - int(first) + 1)
    return count


def variables(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Variables that are gone, that would turn a run into something else, or that are missing."""
    environment = machine.environment
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if environment.get(name, "0") not in ("", "0"):
            yield Finding(
                "error",
                f"{name} is set: torch_xla 2.9 knows it no more, and would train in fp32",
                f"unset {name}, and pass --bf16: bf16 weights with fp32 master weights",
            )
    if environment.get("NEURON_RT_STOCHASTIC_ROUNDING_EN") == "1" and not plan.config.stochastic_rounding:
        yield Finding(
            "error",
            "NEURON_RT_STOCHASTIC_ROUNDING_EN=1 without --stochastic_rounding: every cast to bf16 would be "
            "rounded at random, that of fp32 master weights too",
            "unset it, or pass --bf16 --stochastic_rounding",
        )
    for name in BUCKET_VARIABLES:
        value = environment.get(name)
        if value and (not value.isdigit() or int(value) > BUCKET_MB):
            yield Finding(
                "error",
                f"{name}={value}: buckets of more than {BUCKET_MB} MB gave NaN with neuronx-distributed",
                f"unset {name}: markstep's buckets are those of parallel/buckets.py, whatever it says",
            )
    if plan.bucket_bytes > BUCKET_MB * 10**6:
        yield Finding(
            "error",
            f"BUCKET_BYTES in parallel/buckets.py is {plan.bucket_bytes}: buckets of more than {BUCKET_MB} MB "
            "gave NaN with neuronx-distributed",
            f"make it {BUCKET_MB} * 10**6 or less",
        )
    if environment.get("NEURON_EXTRACT_GRAPHS_ONLY") and plan.phase == "train":
        yield Finding(
            "error",
            "NEURON_EXTRACT_GRAPHS_ONLY is set: nothing would be executed, and nothing saved",
            "unset it: neuron_parallel_compile sets it for its own run",
        )
    if not machine.on_neuron:
        return
    if plan.phase == "precompile" and "neuron_parallel_compile" not in machine.commands:
        yield Finding(
            "error",
            "neuron_parallel_compile is not on the PATH",
            "it comes with torch-neuronx: activate its environment",
        )
    if "MALLOC_ARENA_MAX" not in environment:
        yield Finding("warning", "MALLOC_ARENA_MAX is not set: hosts ran out of memory without", SOURCE_IT)
    if "--model-type" not in environment.get("NEURON_CC_FLAGS", ""):
        yield Finding("warning", "NEURON_CC_FLAGS does not say --model-type=transformer", SOURCE_IT)
    if plan.nnodes > 1 and environment.get("FI_PROVIDER") != "efa":
        yield Finding(
            "error",
            f"FI_PROVIDER={environment.get('FI_PROVIDER', '')}: between nodes it has to be efa",
            "export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1; slurm.sbatch does",
        )


def compiler_flags(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """NEURON_CC_FLAGS against what the run will compile, and rows against the flash attention kernel."""
    if not machine.on_neuron:
        return
    given = machine.environment.get("NEURON_CC_FLAGS", "").replace("=", " ").split()
    options = dict(zip(given, given[1:], strict=False))  # of --name value, the value
    if options.get("--distribution-strategy") == "llm-training":
        level = "error" if flash_attention(plan.config) else "warning"
        yield Finding(
            level,
            "--distribution-strategy=llm-training must not be combined with NKI kernels, such as flash attention"
            + ("" if level == "error" else "; this run has none, but the next may"),
            "take it out of NEURON_CC_FLAGS",
        )
    cast = options.get("--auto-cast", "none")
    if cast != "none" and not plan.config.bf16:
        yield Finding(
            "warning",
            f"--auto-cast={cast}: the compiler rounds what fp32 products take: losses differ from a CPU's",
            "--auto-cast=none in NEURON_CC_FLAGS, or --bf16",
        )
    tokens = plan.config.max_seq_length
    if not plan.config.packing and tokens % FLASH_TOKENS:
        yield Finding(
            "warning",
            f"--max_seq_length {tokens} is no multiple of {FLASH_TOKENS}, as NKI's flash attention needs: "
            "the blockwise attention takes its place",
            f"--max_seq_length {-(-tokens // FLASH_TOKENS) * FLASH_TOKENS}, where rows may be so long",
        )


def flash_attention(config) -> bool:
    """Whether a run on Neuron can take the NKI kernel, as model/attention/flash_nki.py decides it of a model
    whose heads are small enough."""
    return (
        config.bf16
        and config.parallel_layers != "native"
        and not config.packing
        and config.max_seq_length % FLASH_TOKENS == 0
    )


CHECKS = (topology, variables, compiler_flags)
