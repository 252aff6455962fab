"""Copies the launch files of an installed markstep into a directory, to be changed and started there.

    python -m tools.launch_files DIR

They are the scripts for one machine, Slurm and HyperPod, the job files for Kubernetes, and the presets of
flags: DIR/tools/launch and DIR/trainer/presets. The scripts work in DIR as they do in a clone, with the
installed package. A file that is there already, and differs, is an error: nothing is written then. Dockerfile
and docker.sh need the repository, and are not copied.
"""

import shutil
import sys
from pathlib import Path

from tools import cli

SOURCE = Path(__file__).resolve().parent.parent
FOLDERS = ("tools/launch", "trainer/presets")
NEED_THE_REPOSITORY = {"Dockerfile", "docker.sh"}


def files() -> list[Path]:
    """The files that are copied, relative to SOURCE."""
    found = (path for folder in FOLDERS for path in (SOURCE / folder).rglob("*"))
    return sorted(
        path.relative_to(SOURCE)
        for path in found
        if path.is_file() and path.name not in NEED_THE_REPOSITORY and path.parent.name != "__pycache__"
    )


def copy(directory: Path) -> list[Path]:
    """Copy `files` into a directory; returns what was written. Raises ValueError where one differs from what
    is there, and OSError where it cannot be written."""
    missing = []
    for path in files():
        there = directory / path
        if not there.exists():
            missing.append(path)
        elif not there.is_file() or there.read_bytes() != (SOURCE / path).read_bytes():
            raise ValueError(f"{there} exists, and differs: move it away, or name another directory")
    for path in missing:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOURCE / path, directory / path)
        if path.suffix in (".sh", ".sbatch"):  # an installed package loses the permission to execute
            (directory / path).chmod(0o755)
    return missing


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    parser = cli.parser("launch_files", __doc__)
    parser.add_argument("directory", type=cli.path, help="made if it does not exist")
    directory = parser.parse_args(arguments).directory
    try:
        written = copy(directory)
    except (ValueError, OSError) as error:
        return cli.fail(error)
    print(f"wrote {len(written)} files to {directory}: cd there, and start tools/launch/trn1.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
