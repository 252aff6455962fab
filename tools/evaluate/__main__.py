"""Models side by side on a data set: loss, perplexity, and their answers beside the expected ones, in a
page.

    python -m tools.evaluate --base --checkpoint output/checkpoint-150 --model output/merged
        --output evaluation FLAGS

FLAGS are those of trainer/main.py: --dataset and its kin, --max_seq_length, --tensor_parallel_size, --bf16.
With the --do_eval of a run, only its held-out part is evaluated. With --objective dpo the data are preference
pairs: loss and answers are those of the chosen answers, and it says how often a model prefers them. The tool
writes evaluation/answers.jsonl, and evaluation/index.html, a page that loads nothing. Loss and perplexity are
per target token; tools/evaluate/report.py says how answers are scored.
"""

import argparse
import sys
from pathlib import Path

from model.weights.hub import in_one_line
from parallel.runtime import launch, leaves_at_once, prepare_environment, requested_world_size
from tools import cli
from tools.evaluate.report import Measured, loss_of_chosen, write_results
from tools.extras import require


def measure(runtime, source, rows, questions, config, chosen) -> Measured:
    """What is found of one model; every rank calls this."""
    import torch

    from data.loader import Loader
    from model.generation import Generator, capacity_for
    from parallel.mesh import Mesh
    from trainer.evaluation import evaluate
    from trainer.reference import compute_reference

    mesh = Mesh.create(runtime.rank, runtime.world_size, config.tensor_parallel_size)
    model = source.build(
        mesh.tp,
        runtime.device,
        torch.bfloat16 if config.bf16 else torch.float32,
        sequence_parallel=config.divides_sequence,
    )
    runtime.mark_step()
    loader = Loader(
        rows,
        batch_size=config.per_device_eval_batch_size,
        accumulation=1,
        dp_rank=mesh.dp.rank(),
        dp_size=mesh.dp.size(),
        seed=config.seed,
    )
    logps = compute_reference(runtime, model, mesh, loader) if config.trains_on_pairs else None
    loss = evaluate(runtime, model, loader, mesh).loss if logps is None else loss_of_chosen(rows, logps)
    capacity = capacity_for(
        max(len(each.prompt) for each in questions), chosen.max_new_tokens, source.config.max_positions
    )
    generator = Generator(runtime, model, mesh.tp, min(chosen.batch_size, len(questions)), capacity)
    answers = generator.generate([each.prompt for each in questions], chosen.max_new_tokens, source.ends)
    texts = [source.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return Measured(loss, texts, logps)


def open_sources(chosen) -> list:
    """The models that the flags name, in the order of the page.

    Raises ValueError where there is none, one is named twice, or their tokenizers differ.
    """
    from tools.model_source import ModelSource

    if not (chosen.model or chosen.checkpoint):
        raise ValueError("nothing to evaluate: pass --model, --checkpoint, or both")
    if chosen.base and not chosen.checkpoint:
        raise ValueError("--base is the base model of a --checkpoint: pass one, or the base as a --model")
    sources = (
        [ModelSource.of_checkpoint(chosen.checkpoint[0], chosen.base_model, base_only=True)]
        if chosen.base
        else []
    )
    sources += [ModelSource.of_checkpoint(path, chosen.base_model) for path in chosen.checkpoint]
    sources += [ModelSource.of_model(name) for name in chosen.model]
    for source in sources:
        if source.tokenizer.get_vocab() != sources[0].tokenizer.get_vocab():
            raise ValueError(
                f"{source.name} has another tokenizer than {sources[0].name}: their losses cannot be compared"
            )
    if len({source.name for source in sources}) < len(sources):
        raise ValueError("the same model is named twice")
    return sources


def prepare(chosen, config):
    """(models, rows, questions) of the flags; raises ValueError before anything is compiled or written."""
    require("rouge_score")
    from model.generation import capacity_for
    from trainer.dataset import build_rows
    from trainer.reporting import samples

    if min(chosen.max_new_tokens, chosen.batch_size) < 1:
        raise ValueError("--max_new_tokens and --batch_size: at least 1 was expected")
    sources = open_sources(chosen)
    positions = min(source.config.max_positions for source in sources)
    capacity_for(1, chosen.max_new_tokens, positions)
    # A date in the prompts is the one of training; models of others have none of their own.
    asked = next((source for source in sources if source.prompts.date), sources[0])
    train, held_out, summary = build_rows(config, asked.tokenizer, asked.config)
    rows = held_out or train
    questions = samples.questions(rows, positions - chosen.max_new_tokens)
    if not questions:
        raise ValueError(
            f"no prompt leaves room for --max_new_tokens {chosen.max_new_tokens} within {positions} positions"
        )
    print("\n".join(line for line in summary.splitlines() if line.startswith("data: ")))
    for source in sources:
        if source.prompts.date not in (None, asked.prompts.date):
            print(f"data: {source.name} was trained with {source.prompts.date} as today's date")
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {chosen.output} cannot be made: {error.strerror}") from None
    return sources, rows, questions


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own flags, and the flags of trainer/main.py."""
    parser = cli.parser("evaluate", __doc__, trainer_flags=True)
    parser.epilog = "All other flags are those of trainer/main.py; its --help explains them."
    parser.add_argument(
        "--model",
        nargs="+",
        type=cli.path_text,
        default=[],
        help="merged models, or other Llamas: directories or hub ids",
    )
    parser.add_argument(
        "--checkpoint", nargs="+", type=cli.path, default=[], help="directories checkpoint-<step>, not merged"
    )
    parser.add_argument("--base", action="store_true", help="the base model of the first checkpoint too")
    parser.add_argument(
        "--base_model", type=cli.path_text, help="where that is, if no longer where training read it"
    )
    parser.add_argument(
        "--output", type=cli.path, default=Path("evaluation"), help="a directory; default evaluation"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="the longest answer, in tokens; default 64"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="questions that are answered at once; default 8"
    )
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen, flags = parse_arguments(arguments)
    try:
        if leaves_at_once():
            return 0
        from trainer.config import parse

        config = parse(flags)
        world_size = requested_world_size(config.world_size, config.tensor_parallel_size)
        prepare_environment(world_size)
        from model.llama import Llama
        from parallel.mesh import Mesh

        sources, rows, questions = prepare(chosen, config)
        for source in sources:  # built on no device, which raises where the ranks cannot divide it
            Llama(source.config, Mesh.create(0, world_size, config.tensor_parallel_size).tp)
    except (ValueError, OSError) as error:
        return cli.fail(in_one_line(error))
    measured = {}

    def program(runtime):
        for source in sources:
            found = measure(runtime, source, rows, questions, config, chosen)
            if runtime.rank == 0:
                measured[source.name] = found

    launch(program, world_size)
    if measured:
        write_results(chosen.output, sources, measured, rows, questions, config.datasets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
