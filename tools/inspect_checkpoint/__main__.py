"""What a checkpoint, an output directory or a model holds, and whether it is whole; of two of them, in what
they differ.

    python -m tools.inspect_checkpoint DIR [OTHER]

Each is a checkpoint, a Hugging Face model or a peft adapter in safetensors; DIR alone may hold checkpoints.
The exit status is 1 where a checksum is wrong; with two, where a tensor is not equal to the bit. Tensors are
read in bands of rows.
"""

import sys

from tools import cli
from tools.inspect_checkpoint.differences import show_differences
from tools.inspect_checkpoint.show import show_checkpoint, show_model, show_output
from tools.inspect_checkpoint.tensors import find_checkpoints, open_directory


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("inspect_checkpoint", __doc__)
    parser.add_argument(
        "directory", type=cli.path, help="a checkpoint-<step>, an output directory, a model or a peft adapter"
    )
    parser.add_argument("other", type=cli.path, nargs="?", help="a checkpoint or a model to compare with it")
    path, other = vars(parser.parse_args(arguments)).values()
    try:
        if other:
            return show_differences(open_directory(path)[1], open_directory(other)[1], (path, other))
        if checkpoints := find_checkpoints(path):
            return show_output(checkpoints)
        checkpoint, tensors = open_directory(path)
        return show_checkpoint(checkpoint) if checkpoint else show_model(path, tensors)
    except (ValueError, OSError) as error:
        return cli.fail(error)


if __name__ == "__main__":
    sys.exit(main())
