"""Whether a run can start on this machine, and if not, what to do: before anything is compiled, let alone
rented for hours.

    python -m tools.preflight [--nproc_per_node N] [--nnodes M] [--phase precompile] [flags of
    trainer/main.py]

The exit status is 1 where a finding is an error. The flags themselves, model and data are checked by
trainer/main.py, as ever.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

from tools.preflight import checks as preflight_checks
from tools.preflight import flags as preflight_flags
from tools.preflight.checks import Finding, Plan
from tools.preflight.host import Machine, look
from trainer.config import Config, parse

STATE_BYTES = 12  # a trained parameter's weight and two moments, in a checkpoint
LEVELS = ("error", "warning", "ok")


def findings(machine: Machine, plan: Plan) -> list[Finding]:
    """All there is to say, the worst first."""
    found = [
        each for check in (*preflight_checks.CHECKS, *preflight_flags.CHECKS) for each in check(machine, plan)
    ]
    return sorted(found, key=lambda each: LEVELS.index(each.level))


def plan_of(config: Config, nproc: int, nnodes: int, phase: str) -> Plan:
    """The plan, with the sizes of the model where that is a directory: nothing is downloaded to know them."""
    directory, plan = Path(config.model_directory), Plan(config, nproc, nnodes, phase)
    try:
        from model.config import ModelConfig
        from model.weights.shapes import trained_shapes
        from parallel.buckets import BUCKET_BYTES
        from trainer.job import lora_config
    except ImportError:  # that torch or torch-xla is missing is a finding
        return plan
    if not directory.is_dir():
        return replace(plan, bucket_bytes=BUCKET_BYTES)
    files = [] if config.random_seed is not None else list(directory.glob("*.safetensors"))
    shapes = trained_shapes(ModelConfig.from_pretrained(directory), lora_config(config))
    elements = sum(math.prod(shape) for shape in shapes.values())
    return replace(
        plan,
        model_files=len(files),
        model_bytes=sum(file.stat().st_size for file in files),
        checkpoint_bytes=STATE_BYTES * elements,
        bucket_bytes=BUCKET_BYTES,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.preflight",
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        epilog="All other flags are those of trainer/main.py.",
    )
    parser.add_argument(
        "--nproc_per_node",
        type=int,
        help="processes on this machine; default: its NeuronCores, or --world_size",
    )
    parser.add_argument("--nnodes", type=int, default=1, help="machines; default 1")
    parser.add_argument("--phase", choices=("train", "precompile"), default="train", help="default train")
    chosen, flags = parser.parse_known_args(arguments)
    try:
        config, machine = parse(flags), look()
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed: `pip install -e .` in the repository's directory",
            file=sys.stderr,
        )
        return 1
    nproc = (
        chosen.nproc_per_node
        or (machine.neuron_cores if machine.on_neuron else None)
        or config.world_size
        or 1
    )
    try:
        plan = plan_of(config, nproc, chosen.nnodes, chosen.phase)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = findings(machine, plan)
    for each in found:
        print(f"{each.level:<8} {each.what}" + (f"\n{'':<8} to mend: {each.mend}" if each.mend else ""))
    return int(any(each.level == "error" for each in found))


if __name__ == "__main__":
    sys.exit(main())
