"""Runs as one page that opens without a network: curves, evaluations, answers, configuration, restarts.

    python -m tools.show_run OUT [OTHER...] [--output FILE.html]

OUT and OTHER are output directories of runs, which may still be going; all curves are in one chart each.
"""

import sys

from tools import cli
from tools.html_page import write_file
from tools.show_run.page import build
from tools.show_run.run import read_run


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("show_run", __doc__)
    parser.add_argument("runs", type=cli.path, nargs="+", help="output directories of runs")
    parser.add_argument("--output", type=cli.path, help="the page; default: run.html in the first directory")
    chosen = parser.parse_args(arguments)
    output = chosen.output or chosen.runs[0] / "run.html"
    try:
        write_file(output, build([read_run(path) for path in chosen.runs]))
    except ValueError as error:
        return cli.fail(error)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
