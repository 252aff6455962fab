"""Checks of flags and environment: do they contradict each other, or AWS's software? Pure functions."""

from collections.abc import Iterator

from model.attention.flash_nki import LARGEST_HEAD, ROW_MULTIPLE, why_not_flash
from parallel.mesh import Mesh
from parallel.runtime.variables import BF16, CHANGES, is_on, meaning
from tools.preflight.host import Host
from tools.preflight.plan import Finding, Plan
from tools.preflight.sdk import INT64_SINCE, compiler_version
from trainer.config import Config

BUCKET_MB = 140  # with more, neuronx-distributed 0.18 (trainer/trainer.py) knows of NaN in the third step
BUCKET_VARIABLES = (
    "BUCKET_CAP_MB",
    "ALLREDUCE_BUCKET_CAP_MB",
    "ALL_GATHER_REDUCE_SCATTER_BUCKET_CAP_MB",
    "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB",
)
INT64_FLAGS = ("--native-int64=disabled", "--implicit-integer-downcast=all")  # neuron_env.sh says why
SOURCE_IT = "start with tools/launch/trn1.sh or slurm.sbatch, or `. tools/launch/neuron_env.sh` first"


def topology(host: Host, plan: Plan) -> Iterator[Finding]:
    """The world divides into tensor parallel groups, and no variable says that it has another size."""
    tp = plan.config.tensor_parallel_size
    try:
        Mesh.create(0, plan.world, tp)
        nodes = f"{plan.nnodes} node{'s' * (plan.nnodes > 1)}"
        yield Finding("ok", f"{plan.world} ranks: TP{tp} x DP{plan.world // tp} on {nodes}")
    except ValueError as error:
        yield Finding(
            "error",
            str(error).partition(":")[0],
            f"choose NPROC_PER_NODE ({plan.nproc}), nodes ({plan.nnodes}) and --tensor_parallel_size so that "
            "it is",
        )
    if plan.config.world_size and plan.config.world_size != plan.world:
        yield Finding(
            "error",
            f"--world_size {plan.config.world_size}, and {plan.world} processes",
            "leave --world_size out",
        )
    for name, value in (("LOCAL_WORLD_SIZE", plan.nproc), ("WORLD_SIZE", plan.world)):
        if host.environment.get(name, str(value)) != str(value):
            yield Finding(
                "warning",
                f"{name}={host.environment[name]} is set, and the run will have {value}",
                "nothing: torchrun sets its own, and without torchrun it is not read",
            )
    if not host.on_neuron:
        return
    visible = host.environment.get("NEURON_RT_VISIBLE_CORES")
    if visible and (count := count_cores(visible)) != plan.nproc:
        yield Finding(
            "error",
            f"NEURON_RT_VISIBLE_CORES={visible} names {count or 'no'} cores for {plan.nproc} processes",
            f"unset it, or name {plan.nproc}: torch-neuronx gives each process one",
        )
    number = host.environment.get("NEURON_RT_NUM_CORES")
    if number and number not in ("1", str(plan.nproc)):
        yield Finding(
            "error",
            f"NEURON_RT_NUM_CORES={number}, and {plan.nproc} processes with a core each",
            "unset it: torch-neuronx gives each process its core",
        )


def count_cores(ranges: str) -> int:
    """The number of cores in a list such as 0-3,8; 0 where the text is no such list."""
    count = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            return 0
        count += max(0, int(last or first) - int(first) + 1)
    return count


def precision(host: Host, plan: Plan) -> Iterator[Finding]:
    """No variable asks for another precision, rounding or graph than the flags: trainer/main.py takes such
    variables away."""
    set_by_the_program = {"NEURON_RT_STOCHASTIC_ROUNDING_EN"} if plan.config.stochastic_rounding else set()
    for name in [name for name in CHANGES if name not in set_by_the_program]:
        if is_on(value := host.environment.get(name)):
            yield Finding(
                "warning",
                f"{name}={value} is set, and trainer/main.py takes it away: {meaning(name)}",
                f"unset {name}" + (", and pass --bf16" if name in BF16 else ""),
            )


def buckets(host: Host, plan: Plan) -> Iterator[Finding]:
    """No bucket of gradients is so large that it gives NaN with neuronx-distributed."""
    for name in BUCKET_VARIABLES:
        value = host.environment.get(name)
        if value and (not value.isdigit() or int(value) > BUCKET_MB):
            yield Finding(
                "error",
                f"{name}={value}: buckets of more than {BUCKET_MB} MB gave NaN with neuronx-distributed",
                f"unset {name}: markstep's buckets are those of parallel/buckets.py, whatever it says",
            )
    if plan.bucket_bytes > BUCKET_MB * 10**6:
        yield Finding(
            "error",
            f"BUCKET_BYTES in parallel/buckets.py is {plan.bucket_bytes}: buckets of more than {BUCKET_MB} "
            "MB gave NaN with neuronx-distributed",
            f"make it {BUCKET_MB} * 10**6 or less",
        )


def variables(host: Host, plan: Plan) -> Iterator[Finding]:
    """No variable turns the run into something else, and none that it needs is missing."""
    environment = host.environment
    if environment.get("NEURON_EXTRACT_GRAPHS_ONLY") and plan.phase == "train":
        yield Finding(
            "error",
            "NEURON_EXTRACT_GRAPHS_ONLY is set: nothing would be executed, and nothing saved",
            "unset it: neuron_parallel_compile sets it for its own run",
        )
    if not host.on_neuron:
        return
    if plan.phase == "precompile" and "neuron_parallel_compile" not in host.commands:
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


def compiler_flags(host: Host, plan: Plan) -> Iterator[Finding]:
    """NEURON_CC_FLAGS suit what the run will compile, and rows suit the flash attention kernel."""
    if not host.on_neuron:
        return
    words = host.environment.get("NEURON_CC_FLAGS", "").replace("=", " ").split()
    options = dict(zip(words, words[1:], strict=False))  # after --name, its value
    if options.get("--distribution-strategy") == "llm-training":
        level = "error" if flash_attention(plan.config) else "warning"
        yield Finding(
            level,
            "--distribution-strategy=llm-training must not be combined with NKI kernels, such as flash "
            "attention" + ("" if level == "error" else "; this run has none, but the next may"),
            "take it out of NEURON_CC_FLAGS",
        )
    cast = options.get("--auto-cast", "none")
    if cast != "none" and not plan.config.bf16:
        yield Finding(
            "warning",
            f"--auto-cast={cast}: the compiler rounds what fp32 products take: losses differ from a CPU's",
            "--auto-cast=none in NEURON_CC_FLAGS, or --bf16",
        )
    yield from _int64(host, words)
    tokens = plan.config.max_seq_length
    if not plan.config.packing and tokens % ROW_MULTIPLE:
        yield Finding(
            "warning",
            f"--max_seq_length {tokens} is no multiple of {ROW_MULTIPLE}, as NKI's flash attention needs: "
            "the blockwise attention takes its place",
            f"--max_seq_length {-(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE}, where rows may be so long",
        )


def _int64(host: Host, words: list[str]) -> Iterator[Finding]:
    """The flags of 64-bit integers are given where the compiler knows them, and only there."""
    compiler = compiler_version(host.versions)
    for flag in INT64_FLAGS if compiler else ():
        name, given = flag.partition("=")[0], flag.partition("=")[0] in words
        if given and compiler < INT64_SINCE:
            yield Finding(
                "warning",
                f"{name} in NEURON_CC_FLAGS: neuronx-cc {host.versions['neuronx-cc']} does not know it",
                "take it out",
            )
        elif not given and compiler >= INT64_SINCE:
            yield Finding(
                "warning",
                f"NEURON_CC_FLAGS does not say {flag}: newer compilers compute integers in another way",
                SOURCE_IT,
            )


def flash_attention(config: Config) -> bool:
    """Whether a run on Neuron can use the NKI kernel, if its model's heads are small enough.

    Rows that may be packed count as rows of several examples.
    """
    examples = 2 if config.packing else 1
    return config.parallel_layers != "native" and not why_not_flash(
        examples, config.max_seq_length, LARGEST_HEAD, config.bf16
    )


CHECKS = (topology, precision, buckets, variables, compiler_flags)
