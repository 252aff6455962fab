"""A sharded checkpoint -> a Hugging Face model, or the LoRA adapter alone in peft's format.

    python -m tools.merge_checkpoint output/checkpoint-10 merged [--adapter_only | --base_only]
        [--dtype bfloat16] [--verify] [--push_to_hub OWNER/NAME [--private]]

A model card, README.md, comes with it; --push_to_hub uploads all of it when it is complete.
A checkpoint that neuronx-distributed wrote is merged too: it needs --model_id for config and tokenizer.
"""

import sys

from tools import cli
from tools.merge_checkpoint.merging import merge
from tools.merge_checkpoint.sources import DTYPES
from tools.merge_checkpoint.upload import Upload


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("merge_checkpoint", __doc__)
    parser.add_argument(
        "checkpoint",
        type=cli.path,
        help="a directory checkpoint-<step>, or one that neuronx-distributed wrote",
    )
    parser.add_argument(
        "output", type=cli.path, help="the directory to write; it must not exist, or be empty"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--adapter_only", action="store_true", help="write the LoRA adapter alone, in peft's format"
    )
    only.add_argument(
        "--base_only", action="store_true", help="write the base model, without the LoRA update"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights that are written; default: that of the model"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="the largest file (default: 5GB)")
    parser.add_argument("--device", default="cpu", help="where the LoRA products are computed (default: cpu)")
    parser.add_argument(
        "--verify", action="store_true", help="compute everything again and compare it with what was written"
    )
    parser.add_argument(
        "--model_id", type=cli.path_text, help="the base model, where it is no longer where training read it"
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="upload what was written to this repository of the hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push_to_hub, a new repository is private"
    )
    chosen = vars(parser.parse_args(arguments))
    chosen["dtype"] = DTYPES.get(chosen["dtype"])
    checkpoint, output = chosen.pop("checkpoint"), chosen.pop("output")
    repository, private = chosen.pop("push_to_hub"), chosen.pop("private")
    try:
        if private and not repository:
            raise ValueError("--private says how --push_to_hub OWNER/NAME uploads, which is not given")
        upload = Upload(repository, private) if repository else None  # before hours of merging
        merge(checkpoint, output, hub_id=repository, **chosen)
        print(f"wrote {output}", flush=True)
        if upload:
            print(f"uploaded it to {upload.run(output)}")
    except (ValueError, OSError) as error:
        return cli.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
