"""Whether a run can start on this machine, and if not, what to do: before anything is compiled, let alone
rented for hours.

    python -m tools.preflight [--nproc_per_node N] [--nnodes M] [--phase precompile] [flags of
    trainer/main.py]

The exit status is 1 where a finding is an error. The flags themselves, model and data are checked by
trainer/main.py when it starts.
"""

import sys

from tools import cli
from tools.preflight.findings import findings
from tools.preflight.host import look
from tools.preflight.plan import plan_of
from trainer.config import parse


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("preflight", __doc__, trainer_flags=True)
    parser.add_argument(
        "--nproc_per_node",
        type=int,
        help="processes on this machine; default: its NeuronCores, or --world_size",
    )
    parser.add_argument("--nnodes", type=int, default=1, help="machines; default 1")
    parser.add_argument("--phase", choices=("train", "precompile"), default="train", help="default train")
    chosen, flags = parser.parse_known_args(arguments)
    try:
        config, host = parse(flags), look()
        cores = host.neuron_cores if host.on_neuron else None
        nproc = chosen.nproc_per_node or cores or config.world_size or 1
        plan = plan_of(config, nproc, chosen.nnodes, chosen.phase)
    except ModuleNotFoundError as error:
        return cli.fail(f"{error.name} is not installed: `pip install -e .` in the repository's directory")
    except ValueError as error:
        return cli.fail(error)
    found = findings(host, plan)
    for each in found:
        print(f"{each.level:<8} {each.what}" + (f"\n{'':<8} to mend: {each.mend}" if each.mend else ""))
    return int(any(each.level == "error" for each in found))


if __name__ == "__main__":
    sys.exit(main())
