"""The report of a step (the --json of tools.bench_compile): read, compared with the flags, and estimated."""

import json
from pathlib import Path

from tools.graphs.memory import state_of
from tools.graphs.models import rank_model
from tools.graphs.report import rank_0_mesh, step_flops
from tools.plan.instances import Instance
from tools.plan.roofline import Estimate, estimate
from tools.plan.topology import rows_per_step

COUNTS = {"instructions", "inputs", "outputs", "overwritten_bytes"}  # of a graph; older reports lack some


def read_report(path: str) -> dict:
    """The report in a file; raises ValueError where the file cannot be read or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--report {path}: the --json of tools.bench_compile was expected ({error})"
        ) from None


def check_report(report: dict, config, model_config) -> None:
    """Raise ValueError where the report is of another step than that of the Config and the model."""
    from trainer.reporting.flops import micro_batch_flops

    mesh = rank_0_mesh(config)
    sizes = {
        "tensor_parallel_size": mesh.tp.size(),
        "pipeline_parallel_size": mesh.pp.size(),
        "data_parallel_size": mesh.dp.size(),
        "ticks": config.ticks,
    }
    try:
        found = {name: report[name] for name in sizes}
        found["FLOPs"] = step_flops(report)
        found["parameter bytes"] = report["state_bytes"]["parameters"]
        complete = all(set(graph) >= COUNTS for graph in report["graphs"].values())
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the report is none of tools.bench_compile") from None
    if not complete:
        raise ValueError(f"the report is an old one, without {', '.join(sorted(COUNTS))}: write it anew")
    model = rank_model(config, model_config, mesh)
    expected = sizes | {
        "FLOPs": config.gradient_accumulation_steps * micro_batch_flops(model, config),
        "parameter bytes": state_of(model, config, mesh).parameters,
    }
    for what, value in expected.items():
        if found[what] != value:
            raise ValueError(
                f"the report is of another step: {what} {found[what]:,}, and the flags say {value:,}"
            )


def estimate_step(report: dict, config, model_config, instance: Instance) -> Estimate:
    """The estimate of a Config's step; raises ValueError where the report is of another step."""
    check_report(report, config, model_config)
    rows, replays = rows_per_step(config), config.replay
    return estimate(report, instance, rows, config.max_seq_length, config.bf16, replays)
