"""Two runs step by step: where their losses and gradient norms part, and both curves in a picture.

    python -m tools.compare_runs A B [--exact | --tolerance 1e-5] [--picture compare_runs.png]

A and B are output directories, or metrics files. The exit status is 0 where they agree, 1 where they differ
by more than the tolerance, 2 where they cannot be compared.
"""

import json
import math
import sys
from pathlib import Path

from model.weights.hub import naming
from tools import cli
from tools.extras import require

CANNOT_BE_COMPARED = 2
COMPARED = ("loss", "grad_norm")


def read_metrics(path: Path) -> dict[int, dict]:
    """{step: its record} of a metrics.jsonl, or of the directory that holds one.

    Raises ValueError for anything else.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: an output directory of a run, or its metrics.jsonl, was expected"
        )
    records = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
            record |= {key: math.nan for key in COMPARED if record[key] is None}  # it was not finite
            good = isinstance(step, int) and all(isinstance(record[key], int | float) for key in COMPARED)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(
                f"{path}, line {number}: an object with step, {' and '.join(COMPARED)} was expected"
            )
        records[step] = record
    if not records:
        raise ValueError(f"{path} has no step yet")
    return records


def relative_difference(a: float, b: float) -> float:
    """|a - b| / |a|: 0 where both are the same or not a number, infinite where only one is finite."""
    if a == b or math.isnan(a) and math.isnan(b):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / abs(a) if a else math.inf


def compare(a: dict[int, dict], b: dict[int, dict]) -> list[tuple[int, dict[str, float]]]:
    """(step, {metric: relative difference}) of the steps that both runs have.

    Raises ValueError where there is none.
    """
    steps = sorted(set(a) & set(b))
    if not steps:
        raise ValueError(
            f"the runs have no step in common: one has {min(a)} to {max(a)}, the other {min(b)} to {max(b)}"
        )
    return [
        (step, {key: relative_difference(a[step][key], b[step][key]) for key in COMPARED}) for step in steps
    ]


def draw(a: dict[int, dict], b: dict[int, dict], names: tuple[str, str], differences, picture: Path) -> None:
    """Write a picture: loss and gradient norm of both runs, and below each their relative difference."""
    require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(COMPARED), figsize=(11, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for column, key in enumerate(COMPARED):
        above, below = axes[:, column]
        for records, name, style in ((a, names[0], "-"), (b, names[1], "--")):
            above.plot(sorted(records), [records[step][key] for step in sorted(records)], style, label=name)
        above.set_title(key)
        above.legend()
        below.plot(
            [step for step, _ in differences],
            [max(values[key], 1e-17) for _, values in differences],
            ".-",
            color="black",
        )
        below.set_yscale("log")
        below.set_xlabel("step")
        below.set_ylabel("relative difference")
    with naming(picture):
        figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def write_table(a: dict[int, dict], b: dict[int, dict], differences, names: tuple[Path, Path]) -> None:
    """Print a line a step, the steps that only one run has, and the largest difference of each metric."""
    print(
        f"{'step':>6} {'loss':>12} {'':>12} {'difference':>10} {'grad_norm':>12} {'':>12} {'difference':>10}"
    )
    for step, values in differences:
        print(
            f"{step:>6} "
            + " ".join(
                f"{a[step][key]:>12.6g} {b[step][key]:>12.6g} {values[key]:>10.2e}" for key in COMPARED
            )
        )
    for records, others, name in ((a, b, names[0]), (b, a, names[1])):
        alone = len(set(records) - set(others))
        if alone:
            print(f"only {name} has {alone} more step{'s' if alone > 1 else ''}")
    for key in COMPARED:
        step, worst = max(((step, values[key]) for step, values in differences), key=lambda pair: pair[1])
        print(f"{key}: largest relative difference {worst:.2e}, at step {step}")


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("compare_runs", __doc__)
    parser.add_argument("a", type=cli.path, help="an output directory, or its metrics.jsonl: the reference")
    parser.add_argument("b", type=cli.path, help="the run that is compared with it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--exact", action="store_true", help="every loss and gradient norm must be equal to the bit"
    )
    how.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="the largest relative difference that passes; default 1e-5",
    )
    parser.add_argument(
        "--picture", type=cli.path, default=Path("compare_runs.png"), help="where the curves are drawn"
    )
    chosen = parser.parse_args(arguments)
    tolerance = 0.0 if chosen.exact else chosen.tolerance
    if not 0 <= tolerance < math.inf:
        parser.error(f"--tolerance {tolerance}: a number of at least 0 was expected")
    try:
        a, b = read_metrics(chosen.a), read_metrics(chosen.b)
        differences = compare(a, b)
        draw(a, b, (str(chosen.a), str(chosen.b)), differences, chosen.picture)
    except (ValueError, OSError) as error:
        cli.fail(error)
        return CANNOT_BE_COMPARED
    write_table(a, b, differences, (chosen.a, chosen.b))
    beyond = [step for step, values in differences if max(values.values()) > tolerance]
    if beyond:
        print(
            f"the runs differ: {len(beyond)} of {len(differences)} steps by more than {tolerance:g}, "
            f"the first is {beyond[0]}; {chosen.picture}"
        )
        return 1
    how_well = "to the bit" if chosen.exact else f"within {tolerance:g}"
    print(f"the runs agree in {len(differences)} steps, {how_well}; {chosen.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
