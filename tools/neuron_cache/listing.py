"""List what is in a compile cache, or in an archive of one."""

from pathlib import Path

from tools.neuron_cache.archive import count, open_archive, read_manifest
from tools.neuron_cache.cache import entries_of


def listing(path: Path) -> list[str]:
    """A line for each compiler and state of a cache, or for each setting of an archive."""
    if path.is_file():
        with open_archive(path) as tar:
            manifest = read_manifest(tar, path)
        return [
            f"{manifest['compiler']}: {count(manifest['files'])}",
            *(f"    {name:<30} {value}" for name, value in manifest["key"].items()),
        ]
    totals: dict[tuple[str, str], list[int]] = {}
    for entry, state in entries_of(path).items():
        sizes = totals.setdefault((entry.parent.name, state), [])
        sizes.append(sum(file.stat().st_size for file in entry.iterdir() if file.is_file()))
    return [
        f"{name}: {len(sizes)} {state}, {sum(sizes) / 1e6:,.1f} MB"
        for (name, state), sizes in sorted(totals.items())
    ]
