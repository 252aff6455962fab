"""The figures of a walk as a table."""


def print_table(found: dict, old: dict | None) -> None:
    """Print what walk() and extrapolate() have found; in brackets what `old` has."""
    print(
        f"{found['layout']}\n"
        f"{found['parameters'] / 1e6:.1f} M parameters, checkpoint {found['checkpoint_bytes'] / 1e6:.1f} MB, "
        f"base {found['base_bytes'] / 1e6:.1f} MB\n"
        f"largest relative difference of the losses of the restarted and the undisturbed run: "
        f"{found['loss_difference']:.1e}"
    )
    _print(found["runs"], (old or {}).get("runs", {}))
    print("\nmessages a second that the store answers: ", end="")
    print(", ".join(f"{speed:.0f} ({name})" for name, speed in found["store"].items()))
    _print(turned(found["extrapolation"]), turned((old or {}).get("extrapolation", {})))


def turned(table: dict[str, dict]) -> dict[str, dict]:
    """{row: {column: value}} -> {column: {row: value}}."""
    columns = {column for values in table.values() for column in values}
    return {
        column: {row: values[column] for row, values in table.items()} for column in sorted(columns, key=int)
    }


def _print(columns: dict[str, dict], old: dict[str, dict]) -> None:
    rows = list(next(iter(columns.values())))
    width = max(map(len, rows))
    print("\n" + " " * width + "".join(f"{name:>26}" for name in columns))
    for row in rows:
        cells = [_cell(values.get(row), old.get(name, {}).get(row)) for name, values in columns.items()]
        print(f"{row:<{width}}" + "".join(f"{cell:>26}" for cell in cells))


def _cell(value: float | None, old: float | None) -> str:
    return _number(value) + (f" ({_number(old)})" if old is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
