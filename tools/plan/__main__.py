"""What a job will take on Trainium nodes: whether it fits, time and cost of a step as a range, and what
binds. A model.

    python -m tools.plan --model llama3-8b --machine trn1.32xlarge --nodes 1 --tensor_parallel_size 8 \\
      --max_seq_length 2048 --bf16 --gradient_accumulation_steps 16 [--sweep] [--picture FILE] \\
      [--json FILE] [--price USD] [--report FILE] [--storage_gbps GBPS] [any other flag of trainer/main.py]

The step is that of trainer/loop.py, traced without a machine (tools/plan/extrapolate.py), or read from
--report, the --json of tools.bench_compile. The formula is in tools/plan/roofline.py. Figures of the
instances and the shares of them that a step is assumed to get are in tools/plan/instances.py, with their
sources. A step takes as long as the device or the host needs for it, whichever is more: with --replay false
the host traces every step. `--sweep` compares topologies with as many rows a step (tools/plan/sweep.py).
Without it, what start, save and resume read and write comes after the step (tools/plan/storage.py).
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from tools import cli
from tools.graphs.checks import check_file, check_flags
from tools.graphs.models import PRESETS, rank_model, read_model
from tools.graphs.report import rank_0_mesh
from tools.plan.extrapolate import reports
from tools.plan.file_systems import chosen_file_systems, describe_storage, record_storage
from tools.plan.instances import INSTANCES
from tools.plan.output import SHOWN, describe, preface, price_source, record, table
from tools.plan.step_report import estimate_step, read_report
from tools.plan.storage import storage_of
from tools.plan.sweep import sweep
from tools.plan.topology import rows_per_step, topology_name


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    os.environ["PJRT_DEVICE"] = "CPU"
    chosen, rest = _parser().parse_known_args(arguments)
    from trainer.config import parse

    config, instance = parse(rest), INSTANCES[chosen.machine]
    price = chosen.price if chosen.price is not None else instance.price
    try:
        config, model_config = _prepare(chosen, config)
        if chosen.sweep:
            pairs = sweep(config, model_config, instance)
        else:
            report = read_report(chosen.report) if chosen.report else reports([config], model_config)[0]
            pairs = [(config, estimate_step(report, config, model_config, instance))]
    except ValueError as error:
        return cli.fail(error)
    title = (
        f"{chosen.model} on {chosen.nodes} x {chosen.machine}, "
        f"{rows_per_step(config)} rows of {config.max_seq_length} tokens a step"
    )
    print(f"{title}\n{preface()}")
    if chosen.price is None:
        print(price_source(price))
    print()
    facts = {"model": chosen.model, "machine": chosen.machine, "nodes": chosen.nodes, "price": price}
    if chosen.sweep:
        print(table(pairs, price))
    else:
        print(f"{topology_name(config)}\n{describe(pairs[0][1], price)}\n")
        storage = storage_of(config, model_config, instance.cores)
        systems = chosen_file_systems(chosen.storage_gbps)
        print(describe_storage(storage, systems))
        facts["storage"] = record_storage(storage, systems)
    if chosen.json:
        cli.write_json(chosen.json, facts | {"estimates": [record(*pair, price) for pair in pairs]})
    if chosen.picture:
        from tools.plan.picture import draw

        try:
            draw([(topology_name(one), each) for one, each in pairs[:SHOWN]], title, Path(chosen.picture))
        except OSError as error:
            return cli.fail(f"{chosen.picture} cannot be written: {error.strerror}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("plan", __doc__, trainer_flags=True)
    parser.add_argument(
        "--model",
        type=cli.path_text,
        required=True,
        help=f"{', '.join(PRESETS)}, tiny, a directory or a config.json",
    )
    parser.add_argument(
        "--machine", choices=INSTANCES, default="trn1.32xlarge", help="default: trn1.32xlarge"
    )
    parser.add_argument("--nodes", type=int, default=1, help="how many of them; default 1")
    parser.add_argument(
        "--report",
        type=cli.path_text,
        metavar="FILE",
        help="the step, as tools.bench_compile --json wrote it; default: trace it",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="compare all topologies with as many rows a step"
    )
    parser.add_argument(
        "--picture", type=cli.path_text, metavar="FILE", help="draw time and memory into a PNG"
    )
    parser.add_argument("--json", type=cli.path_text, metavar="FILE", help="write the estimates to FILE")
    parser.add_argument(
        "--price", type=float, help="USD an hour and node; default: on demand, where a list price is known"
    )
    parser.add_argument(
        "--storage_gbps",
        type=float,
        help="GB/s that the shared file system reads and writes in all; default: three of AWS's",
    )
    return parser


def _prepare(chosen: argparse.Namespace, config) -> tuple:
    """(the Config of all cores of the nodes, the ModelConfig); raises ValueError for flags that do not go
    together."""
    check_flags(config)
    if chosen.nodes < 1:
        raise ValueError(f"--nodes {chosen.nodes}: at least 1 was expected")
    if chosen.price is not None and not 0 < chosen.price < 1e6:
        raise ValueError(f"--price {chosen.price}: USD an hour and node, above 0, were expected")
    if chosen.storage_gbps is not None and not 0 < chosen.storage_gbps < 1e6:
        raise ValueError(f"--storage_gbps {chosen.storage_gbps}: GB/s above 0 were expected")
    if chosen.report and chosen.sweep:
        raise ValueError("--report is of one topology, and --sweep traces many: choose one")
    cores = chosen.nodes * INSTANCES[chosen.machine].cores
    if config.world_size not in (None, cores):
        raise ValueError(
            f"--world_size {config.world_size}: {chosen.nodes} x {chosen.machine} have {cores} cores; "
            "leave the flag out"
        )
    config = replace(config, world_size=cores)
    model_config = read_model(chosen.model)
    rank_model(
        config, model_config, rank_0_mesh(config)
    )  # raises ValueError where the model cannot be divided
    check_file("--json", chosen.json)
    check_file("--picture", chosen.picture)
    return config, model_config


if __name__ == "__main__":
    sys.exit(main())
