"""What a job will take on Trainium nodes: whether it fits, time and cost of a step as a range, and what
binds. A model.

    python -m tools.plan --model llama3-8b --machine trn1.32xlarge --nodes 1 --tensor_parallel_size 8
    --max_seq_length 2048 \\
      --bf16 --gradient_accumulation_steps 16 [--sweep] [--picture FILE] [--json FILE] [--price USD] [--report
      FILE] \\
      [any other flag of trainer/main.py]

The step is that of trainer/loop.py, traced without a machine (tools/plan/extrapolate.py, or --report, the
--json of tools.bench_compile). Figures of the machines and the shares of them that a step is assumed to get
stand in tools/plan/instances.py with their sources, the formula in tools/plan/roofline.py. `--sweep` holds
the rows of a step and takes every tensor parallel size, gradient checkpointing and micro-batch of at most 4
rows (a larger one only where the smaller is sure to fit), with ZeRO-1 wherever ranks are data parallel: in
this model it costs no time and saves memory. Of pipeline stages it takes 1, 2, 4 and 8, with as many
micro-batches on their way as the rows of a step allow, at most 4 a stage: of those less than a fifth of the
ticks are idle, (P - 1) / (M + P - 1).
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from parallel.mesh import Mesh
from tools.bench_compile import REFUSED, check_outputs
from tools.graphs.models import PRESETS, read_model
from tools.graphs.report import state_of
from tools.plan.extrapolate import reports
from tools.plan.instances import FAST, MACHINES, PRICED, SLOW
from tools.plan.roofline import FORMULA, PARTS, Estimate, estimate
from trainer.build import build

LARGEST_MICRO_BATCH = 4
STAGES = 1, 2, 4, 8
MICRO_BATCHES_A_STAGE = 4
SHOWN = 20


def name_of(config) -> str:
    """A topology in a few words."""
    tp, pp, accumulation = (
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
        config.gradient_accumulation_steps,
    )
    rows = f"{config.per_device_train_batch_size // config.pipeline_microbatches} x "
    rows += f"{config.pipeline_microbatches} in {config.ticks} ticks x " if config.ticks > 1 else ""
    said = f"TP{tp}{f' x PP{pp}' if pp > 1 else ''} x DP{config.world_size // tp // pp}, {rows}{accumulation} rows"
    recomputed = {"none": "", "selective": ", scores recomputed", "full": ", layers recomputed"}
    said += recomputed[config.checkpointing_mode]
    return said + (", ZeRO-1" if config.zero_1 else "")


def rows_of(config) -> int:
    """Of a step, over all ranks."""
    data = config.world_size // config.tensor_parallel_size // config.pipeline_parallel_size
    return data * config.per_device_train_batch_size * config.gradient_accumulation_steps


def mesh_of(config) -> Mesh:
    """Rank 0's."""
    return Mesh.create(0, config.world_size, config.tensor_parallel_size, config.pipeline_parallel_size)


def checked(report: dict, config, model_config) -> dict:
    """The report, where its products are those of the flags; raises ValueError where they are not."""
    from tools.graphs.flops import micro_batch_flops

    mesh = mesh_of(config)
    sizes = {
        "tensor_parallel_size": mesh.tp.size(),
        "pipeline_parallel_size": mesh.pp.size(),
        "data_parallel_size": mesh.dp.size(),
        "ticks": config.ticks,
    }
    try:
        found = {name: report[name] for name in sizes}
        found["FLOPs"] = sum(
            graph["runs_per_step"] * graph["dot_flops"] for graph in report["graphs"].values()
        )
        found["parameter bytes"] = report["state_bytes"]["parameters"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the report is none of tools.bench_compile") from None
    model = build(config, model_config, mesh)
    expected = sizes | {
        "FLOPs": config.gradient_accumulation_steps * micro_batch_flops(model, config),
        "parameter bytes": state_of(model, config, mesh).parameters,
    }
    for what, value in expected.items():
        if found[what] != value:
            raise ValueError(
                f"the report is of another step: {what} {found[what]:,}, and the flags say {value:,}"
            )
    return report


def estimated(report: dict, config, model_config, machine) -> Estimate:
    """Of the step of a Config; raises ValueError where the report is of another."""
    report = checked(report, config, model_config)
    return estimate(report, machine, rows_of(config), config.max_seq_length, config.bf16)


def topologies(config, model_config, cores_of_a_node: int) -> list:
    """All that a sweep takes, with micro-batches of one row: Configs with as many rows a step as `config`."""
    rows, found = rows_of(config), []
    for tp, pp in product(range(1, min(config.world_size, cores_of_a_node) + 1), STAGES):
        data = config.world_size // tp // pp
        if cores_of_a_node % tp or config.world_size % (tp * pp) or rows % data:
            continue
        most = min(rows // data, MICRO_BATCHES_A_STAGE * pp) if pp > 1 else 1
        micro_batches = max(count for count in range(1, most + 1) if rows // data % count == 0)
        for recompute in ("none", "selective", "full"):
            one = replace(
                config,
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                num_microbatches=micro_batches,
                per_device_train_batch_size=micro_batches,
                gradient_checkpointing=recompute,
                zero_1=data > 1,
                gradient_accumulation_steps=rows // data // micro_batches,
            )
            try:
                build(one, model_config, mesh_of(one))
            except ValueError:  # the model's heads, its vocabulary or its layers do not divide
                continue
            found.append(one)
    if not found:
        raise ValueError(
            f"--sweep: no topology of {config.world_size} ranks has {rows} rows a step: raise "
            "--gradient_accumulation_steps, which counts for the topology of the other flags"
        )
    return found


def sweep(config, model_config, machine) -> list[tuple]:
    """[(Config, Estimate)], the fastest that is sure to fit first, what does not fit last."""
    found, open_ = [], topologies(config, model_config, machine.cores)
    while open_:
        print(f"tracing {len(open_)} topologies ...", file=sys.stderr)
        estimates = [
            (one, estimated(report, one, model_config, machine))
            for one, report in zip(open_, reports(open_, model_config), strict=True)
        ]
        found += estimates
        open_ = [
            replace(
                one,
                per_device_train_batch_size=2 * one.per_device_train_batch_size,
                gradient_accumulation_steps=one.gradient_accumulation_steps // 2,
            )
            for one, each in estimates
            if each.fits == "yes"
            and one.per_device_train_batch_size // one.pipeline_microbatches < LARGEST_MICRO_BATCH
            and one.gradient_accumulation_steps % 2 == 0
        ]
    order = ("yes", "perhaps", "no")
    return sorted(found, key=lambda pair: (order.index(pair[1].fits), sum(pair[1].seconds)))


def describe(each: Estimate, price: float | None) -> str:
    """An estimate as text."""

    def between(pair, digits=3):
        return " to ".join(
            f"{value:,.{digits}g}" if value < 1000 else f"{value:,.0f}" for value in sorted(pair)
        )

    waits = ", ".join(f"{part} {between(each.parts[part])}" for part in PARTS)
    verdict = {"yes": "fits", "no": "does not fit", "perhaps": "may fit: the compiler will tell"}[each.fits]
    held, most, memory = (size / 1e9 for size in (each.held_bytes, each.most_bytes, each.memory_bytes))
    said = [
        f"memory of a core: {verdict}. {held:.2f} GB are held, at most {most:.2f} GB live at once, of {memory:.2f} GB",
        f"step: {between(each.seconds)} s ({waits}); {each.binds} binds",
        f"roofline: {each.roofline_seconds:.3g} s; the step takes "
        f"{between(one / each.roofline_seconds for one in each.seconds)} times that, and its products "
        f"{between(100 * one for one in each.peak_share)} % of the peak",
        f"{between(each.tokens_per_second_per_node)} tokens/s a node, {between(each.rows_per_second)} rows/s in all",
    ]
    if each.bubble:
        said.append(
            f"of the ticks of a stage {each.bubble:.1%} are idle (the bubble), and are paid for above"
        )
    if price:
        said.append(
            f"{between(each.cost(price))} USD for a million tokens, at {price:.2f} USD an hour and node"
        )
    return "\n".join(said)


def table(found: list[tuple], price: float | None) -> str:
    """The topologies of a sweep, as text; some that do not fit are left out."""
    said = [
        f"{'fits':8}{'held GB':>8}{'most GB':>8}{'step s':>16}{'tokens/s a node':>18}{'USD/M tokens':>15}  binds    topology"
    ]
    for config, each in found[:SHOWN]:
        cost = "{1:.3f} - {0:.3f}".format(*sorted(each.cost(price), reverse=True)) if price else ""
        step, rate = (
            "{:.2f} - {:.2f}".format(*each.seconds),
            "{1:,.0f} - {0:,.0f}".format(*each.tokens_per_second_per_node),
        )
        said.append(
            f"{each.fits:8}{each.held_bytes / 1e9:8.2f}{each.most_bytes / 1e9:8.2f}{step:>16}{rate:>18}{cost:>15}  "
            f"{each.binds:8} {name_of(config)}"
        )
    left = len(found) - SHOWN
    return "\n".join(said + ([f"... and {left} more, slower or too large"] if left > 0 else []))


def as_record(config, each: Estimate, price: float | None) -> dict:
    """For --json."""
    flags = (
        "world_size",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "zero_1",
    )
    return {
        **{flag: getattr(config, flag) for flag in flags},
        "gradient_checkpointing": config.checkpointing_mode,
        "num_microbatches": config.pipeline_microbatches,
        **vars(each),
        "fits": each.fits,
        "seconds": each.seconds,
        "binds": each.binds,
        "peak_share": each.peak_share,
        "tokens_per_second_per_node": each.tokens_per_second_per_node,
        "rows_per_second": each.rows_per_second,
        "usd_per_million_tokens": each.cost(price) if price else None,
    }


def read_report(path: str) -> dict:
    """Raises ValueError for a file that is no report."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--report {path}: the --json of tools.bench_compile was expected ({error})"
        ) from None


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="All other flags are those of trainer/main.py.",
    )
    parser.add_argument(
        "--model", required=True, help=f"{', '.join(PRESETS)}, tiny, a directory or a config.json"
    )
    parser.add_argument("--machine", choices=MACHINES, default="trn1.32xlarge", help="default: trn1.32xlarge")
    parser.add_argument("--nodes", type=int, default=1, help="how many of them; default 1")
    parser.add_argument(
        "--report", metavar="FILE", help="the step, as tools.bench_compile --json wrote it; default: trace it"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="compare all topologies with as many rows a step"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw time and memory into a PNG")
    parser.add_argument("--json", metavar="FILE", help="write the estimates to FILE")
    parser.add_argument(
        "--price", type=float, help="USD an hour and node; default: on demand, where a list price is known"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    os.environ["PJRT_DEVICE"] = "CPU"
    chosen, rest = parser_of().parse_known_args(arguments)
    from trainer.config import parse

    config, machine = parse(rest), MACHINES[chosen.machine]
    price = chosen.price if chosen.price is not None else machine.price
    try:
        for flag, reason in REFUSED.items():
            if getattr(config, flag):
                raise ValueError(f"--{flag} is not taken here: {reason}")
        if chosen.nodes < 1:
            raise ValueError(f"--nodes {chosen.nodes}: at least 1 was expected")
        if chosen.price is not None and not 0 < chosen.price < 1e6:
            raise ValueError(f"--price {chosen.price}: USD an hour and node, above 0, were expected")
        if chosen.report and chosen.sweep:
            raise ValueError("--report is of one topology, and --sweep traces many: choose one")
        if config.world_size not in (None, chosen.nodes * machine.cores):
            raise ValueError(
                f"--world_size {config.world_size}: {chosen.nodes} x {chosen.machine} have "
                f"{chosen.nodes * machine.cores} cores; leave the flag out"
            )
        config = replace(config, world_size=chosen.nodes * machine.cores)
        model_config = read_model(chosen.model)
        build(config, model_config, mesh_of(config))
        check_outputs(None, chosen.json)
        if chosen.picture and not Path(chosen.picture).absolute().parent.is_dir():
            raise ValueError(
                f"--picture {chosen.picture} cannot be written: a file in a directory that exists was expected"
            )
        if chosen.sweep:
            found = sweep(config, model_config, machine)
        else:
            report = read_report(chosen.report) if chosen.report else reports([config], model_config)[0]
            found = [(config, estimated(report, config, model_config, machine))]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    title = (
        f"{chosen.model} on {chosen.nodes} x {chosen.machine}, "
        f"{rows_of(config)} rows of {config.max_seq_length} tokens a step"
    )
    print(
        f"{title}\nThis is a model: nothing ran on a Trainium. The range is that of what is assumed (tools/plan/instances.py).\n"
        f"{FORMULA}"
    )
    for name, assumed in (("fast", FAST), ("slow", SLOW)):
        print(
            f"{name}: "
            + ", ".join(f"{what.replace('_', ' ')} {value:g}" for what, value in vars(assumed).items())
        )
    if chosen.price is None:
        print(f"price: {PRICED if price else 'none is known here, say --price'}")
    print()
    print(table(found, price) if chosen.sweep else f"{name_of(config)}\n{describe(found[0][1], price)}")
    if chosen.json:
        records = [as_record(*pair, price) for pair in found]
        Path(chosen.json).write_text(
            json.dumps(
                {
                    "model": chosen.model,
                    "machine": chosen.machine,
                    "nodes": chosen.nodes,
                    "price": price,
                    "estimates": records,
                },
                indent=1,
            )
            + "\n",
            encoding="utf-8",
        )
    if chosen.picture:
        from tools.plan.picture import draw

        draw([(name_of(one), each) for one, each in found[:SHOWN]], title, Path(chosen.picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
