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
    lines = ["| | tokens/s | target tokens/s | markstep to it | of the GEMM peak |", "|---|---|---|---|---|"]
    ours = [rates(each["markstep"]) for each in rounds]
    share = [each["markstep"]["mfu"] / rate["positions"] for each, rate in zip(rounds, ours, strict=True)]
    for side in rounds[0]:
        rate = [rates(each[side]) for each in rounds]
        ratios = [own["tokens"] / each["tokens"] for own, each in zip(ours, rate, strict=True)]
        shares = [each["positions"] * part for each, part in zip(rate, share, strict=True)]
        lines.append(
            f"| {SIDES[side]} | {np.median([each['tokens'] for each in rate]):.0f} "
            f"| {np.median([each['target_tokens'] for each in rate]):.0f} "
            f"| {_spread(ratios)} | {np.median(shares):.0%} |"
        )
    return lines


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
