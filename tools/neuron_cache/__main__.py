"""Compiled graphs, packed to be shipped beside the training package, and unpacked where they fit.

    python -m tools.neuron_cache pack CACHE ARCHIVE.tar --world_size 32 [flags of trainer/main.py]
    python -m tools.neuron_cache unpack ARCHIVE.tar CACHE --world_size 32 [flags of trainer/main.py]
    python -m tools.neuron_cache list CACHE|ARCHIVE.tar

Graphs depend on the size of the world and on flags. An archive says for which ones it was made, and is
refused for others: with them, everything would be compiled again without a word.
"""

import os
import sys

from tools import cli
from tools.neuron_cache.archive import pack, unpack
from tools.neuron_cache.cache import installed_compiler
from tools.neuron_cache.key import key_of
from tools.neuron_cache.listing import listing
from trainer.config import parse

COMMANDS = (
    ("pack", "write what is complete in CACHE into a new ARCHIVE", ("cache", "archive")),
    ("unpack", "put ARCHIVE's graphs into CACHE, where they fit", ("archive", "cache")),
    ("list", "what is in a cache or an archive", ("path",)),
)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    # The trainer's flags begin with the first flag that is not --help.
    flags = (number for number, word in enumerate(words) if word.startswith("--") and word != "--help")
    end = next(flags, len(words))
    parser = cli.parser("neuron_cache", __doc__)
    parser.epilog = "Flags of trainer/main.py follow these arguments; list takes none."
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text, paths in COMMANDS:
        command = commands.add_parser(name, help=help_text)
        for path in paths:
            command.add_argument(path, type=cli.path)
    chosen = parser.parse_args(words[:end])
    try:
        if chosen.command == "list":
            lines = listing(chosen.path)
        else:
            key, compiler = key_of(parse(words[end:]), os.environ), installed_compiler()
            if chosen.command == "pack":
                lines = pack(chosen.cache, chosen.archive, key, compiler)
            else:
                lines = unpack(chosen.archive, chosen.cache, key, compiler)
    except (ValueError, OSError) as error:
        return cli.fail(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
