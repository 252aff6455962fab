"""How long a file system needs for what a job reads and writes, and the lines about it."""

from dataclasses import asdict, dataclass

from tools.plan.storage import TOKEN_BYTES, Moved, Storage

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class FileSystem:
    """Bytes/s that all nodes together read and write, and that one node moves (infinite: not known)."""

    read: float
    write: float
    node: float = float("inf")

    def seconds(self, moved: Moved, writes: bool = False) -> float:
        """The seconds in which these bytes are moved, at the published speed."""
        return max(moved.total / (self.write if writes else self.read), moved.node / self.node)


# AWS's figures, as its pages gave them in November 2026; none was measured:
# - https://docs.aws.amazon.com/fsx/latest/LustreGuide/ssd-storage.html: MB/s of the disks for each TiB. What
#   the servers still have in memory is read faster.
# - https://docs.aws.amazon.com/efs/latest/ug/performance.html: Regional, Elastic; the lower ends of 20 to 60
#   GiB/s read and of 1 to 5 GiB/s written, and 1,500 MiB/s a client.
FILE_SYSTEMS = {
    "FSx 12 TiB x 250": FileSystem(12 * 250e6, 12 * 250e6),
    "FSx 12 TiB x 1000": FileSystem(12 * 1000e6, 12 * 1000e6),
    "EFS elastic": FileSystem(20 * GIB, GIB, 1500 * MIB),
}
ACTIONS = {  # what moves: (in words, whether it is written)
    "base": ("start: read the base model", False),
    "hashed": ("start, resume: hash the base model", False),
    "frozen": ("resume: read the frozen weights", False),
    "resumed": ("resume: read the checkpoint", False),
    "saved": ("save: write the checkpoint", True),
}


def chosen_file_systems(gbps: float | None) -> dict[str, FileSystem]:
    """The file system of --storage_gbps, or the published ones."""
    return {f"{gbps:g} GB/s": FileSystem(gbps * 1e9, gbps * 1e9)} if gbps else FILE_SYSTEMS


def describe_storage(storage: Storage, systems: dict[str, FileSystem]) -> str:
    """What a job reads and writes as text: a line for each of ACTIONS in which something moves."""
    lines = [f"{'storage':36}{'GB a node':>10}{'GB in all':>11}" + "".join(f"{each:>19}" for each in systems)]
    for name, (what, writes) in ACTIONS.items():
        moved = getattr(storage, name)
        if moved.total:
            times = (f"{each.seconds(moved, writes):,.3g} s" for each in systems.values())
            sizes = f"{moved.node / 1e9:10.2f}{moved.total / 1e9:11.2f}"
            lines.append(f"{what:36}{sizes}" + "".join(f"{each:>19}" for each in times))
    lines += [
        f"a checkpoint: {storage.files:,} files of the ranks, the largest with "
        f"{storage.largest_file / 1e9:.3g} GB, and a manifest of about {storage.manifest / 1e6:,.2f} MB, "
        "which every rank reads",
        f"memory of a node: {storage.copy / 1e9:.3g} GB for the state while it is written",
        f"at the start the ranks of a node ask for {storage.base.asked / 1e9:.3g} GB of the base model: what "
        "is asked for again comes from memory",
        f"tokens: {TOKEN_BYTES} GB on each machine for 1e9 tokens of the data",
    ]
    return "\n".join(lines)


def record_storage(storage: Storage, systems: dict[str, FileSystem]) -> dict:
    """The same for --json; bytes, and seconds by file system."""
    seconds = {
        name: {of: each.seconds(getattr(storage, of), writes) for of, (_, writes) in ACTIONS.items()}
        for name, each in systems.items()
    }
    return asdict(storage) | {"token_bytes": TOKEN_BYTES, "seconds": seconds}
