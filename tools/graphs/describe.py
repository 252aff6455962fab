"""The report of a step as text."""


def describe(report: dict) -> str:
    """The lines that bench_compile prints of a report."""
    lines = [line for name, graph in report["graphs"].items() for line in _graph_lines(name, graph)]
    stages = report["stage_layers"]
    if len(stages) > 1:
        lines.append(
            f"{len(stages)} stages of {report['slots']} layers ({sum(stages)} in all), "
            f"{report['num_microbatches']} micro-batches in {report['ticks']} ticks: "
            f"{(len(stages) - 1) / report['ticks']:.1%} of them idle"
        )
    if report["kept_bytes"]:
        lines.append(
            f"forward ticks keep {format_bytes(report['kept_bytes'] // report['ticks'])} each for the "
            f"backward, {format_bytes(report['kept_bytes'])} in all"
        )
    counted, formula = report["step_flops"], report["formula_flops"]
    state = ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in report["state_bytes"].items()
    )
    lines += [
        f"products of a step: {counted:.6g} FLOPs a core in the graph, {formula:.6g} by the formula "
        f"({counted / formula - 1:+.3%})",
        f"a core {'of each stage ' if len(stages) > 1 else ''}holds: {state}; "
        f"at most {format_bytes(report['most_bytes'])} live at once",
    ]
    return "\n".join(lines)


def format_bytes(count: int) -> str:
    """A size with a decimal unit, such as 1.23 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _graph_lines(name: str, graph: dict) -> list[str]:
    runs = "once" if graph["runs_per_step"] == 1 else f"{graph['runs_per_step']} times"
    compiled = ""
    if graph["compile_seconds"] is not None:
        compiled = f", XLA:CPU compiles {graph['compile_seconds']:.2f} s"
    return [
        f"graph {name}, {runs} a step: {graph['instructions']} HLO instructions, traced "
        f"in {graph['trace_seconds']:.2f} s, lowered in {graph['lowering_seconds']:.2f} s{compiled}",
        "  " + ", ".join(f"{count} {opcode}" for opcode, count in graph["operations"].items()),
        *(
            f"  {kind}: {each['count']} of {format_bytes(each['bytes'])} in all"
            for kind, each in graph["collectives"].items()
        ),
        f"  inputs {format_bytes(graph['input_bytes'])}, outputs {format_bytes(graph['output_bytes'])}, "
        f"at most {format_bytes(graph['peak_bytes'])} live beside the inputs",
        _shares(graph["at_peak"]["bytes"]),
        *(_alive_line(each) for each in graph["at_peak"]["largest"]),
    ]


def _shares(sizes: dict[str, int]) -> str:
    """The line of what lives at the peak, by kind."""
    total = sum(sizes.values())
    parts = (f"{kind} {format_bytes(size)} ({size / total:.0%})" for kind, size in sizes.items() if size)
    return f"  at its peak {format_bytes(total)} live: {', '.join(parts)}; the largest beside the state:"


def _alive_line(each: dict) -> str:
    """A line of what lives at the peak."""
    shape = f"{each['dtype']}[{','.join(map(str, each['shape']))}]"
    where = " ".join(filter(None, (each["module"], each["line"])))
    return f"    {format_bytes(each['bytes']):>9}  {each['count']:3} x {shape:24} {each['kind']:17} {where}"
