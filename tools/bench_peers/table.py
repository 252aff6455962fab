"""The figures of all rounds as a table."""

import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from tools.bench_peers.runs import SIDES

PACKAGES = ("torch", "torch_xla", "transformers", "peft", "trl", "accelerate", "numpy")


def rates(measured: dict) -> dict[str, float]:
    """Tokens, target tokens and positions a second, from the figures of markstep or of a peer."""
    if "seconds" in measured:
        return {
            name: measured[name] / float(np.median(measured["seconds"]))
            for name in ("tokens", "target_tokens", "positions")
        }
    names = {"tokens": "tokens", "target_tokens": "target_tokens", "positions": "padded_tokens"}
    return {name: measured[f"{theirs}_per_second"] for name, theirs in names.items()}


def table(rounds: list[dict[str, dict]]) -> list[str]:
    """The lines of a Markdown table with a row for each side.

    `rounds`: {side: its figures} of each round. Rates are medians over the rounds; ratios are those within a
    round.
    """
    lines = [
        "| | tokens/s | target tokens/s | markstep to it | of the GEMM peak | memory GB |",
        "|---|---|---|---|---|---|",
    ]
    ours = [rates(each["markstep"]) for each in rounds]
    share = [each["markstep"]["mfu"] / rate["positions"] for each, rate in zip(rounds, ours, strict=True)]
    for side in rounds[0]:
        rate = [rates(each[side]) for each in rounds]
        ratios = [own["tokens"] / each["tokens"] for own, each in zip(ours, rate, strict=True)]
        shares = [each["positions"] * part for each, part in zip(rate, share, strict=True)]
        lines.append(
            f"| {SIDES[side]} | {np.median([each['tokens'] for each in rate]):.0f} "
            f"| {np.median([each['target_tokens'] for each in rate]):.0f} "
            f"| {_spread(ratios)} | {np.median(shares):.0%} | {_memory([each[side] for each in rounds])} |"
        )
    return lines


def gpu_table(rounds: list[dict[str, dict]]) -> list[str]:
    """As `table`, with a row for markstep's traced steps, and what a GPU has besides: seconds of a step,
    FLOP/s, memory in use, and seconds from a side's start to the end of its first step.

    FLOPs are those that the model needs for the positions of a step, by markstep's formula for all sides.
    """
    traced = [markstep_traced(each["markstep"]) for each in rounds]
    flops = [
        each["markstep"]["mfu"]
        * each["markstep"]["gemm_flops_per_second"]
        / rates(each["markstep"])["positions"]
        for each in rounds
    ]
    peak = float(np.median([each["markstep"]["gemm_flops_per_second"] for each in rounds]))
    lines = [
        "| | tokens/s | target tokens/s | markstep to it | s a step | TFLOP/s | of the GEMM peak | memory GB "
        "| first step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sides = {SIDES[side]: [each[side] for each in rounds] for side in rounds[0]}
    for name, found in {"markstep, traced every step": traced, **sides}.items():
        rate = [rates(each) for each in found]
        ratios = [
            rates(each["markstep"])["tokens"] / own["tokens"] for each, own in zip(rounds, rate, strict=True)
        ]
        first = np.median([each["first_step_seconds"] for each in found])
        speed = float(np.median([own["positions"] * each for own, each in zip(rate, flops, strict=True)]))
        lines.append(
            f"| {name} | {np.median([each['tokens'] for each in rate]):.0f} "
            f"| {np.median([each['target_tokens'] for each in rate]):.0f} | {_spread(ratios)} "
            f"| {np.median([_seconds(each) for each in found]):.4f} | {speed / 1e12:.3g} "
            f"| {speed / peak:.0%} | {_memory(found)} | {first:.1f} |"
        )
    return [*lines, f"GEMM peak: {peak / 1e12:.3g} TFLOP/s"]


def markstep_traced(measured: dict) -> dict:
    """The figures of markstep as they are where each step is traced."""
    slower = measured["step_seconds"] / measured["step_trace_seconds"]
    rate = {name: value * slower for name, value in measured.items() if name.endswith("_per_second")}
    return measured | rate | {"step_seconds": measured["step_trace_seconds"]}


def _seconds(measured: dict) -> float:
    return float(np.median(measured["seconds"])) if "seconds" in measured else measured["step_seconds"]


def _memory(found: list[dict]) -> str:
    """GB of a side's memory, the most of all rounds: of the device, on a CPU of the process."""
    names = ("memory_bytes", "peak_device_memory_bytes", "peak_memory_bytes")
    most = [next(each[name] for name in names if name in each) for each in found]
    return f"{max(most) / 1e9:.2f}"


def versions() -> str:
    """The versions of Python and of the packages that are installed."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _spread(values) -> str:
    """median (least - most)."""
    return f"{np.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"
