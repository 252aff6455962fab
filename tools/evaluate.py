"""Models side by side on a data set: loss, perplexity, and their answers beside the expected ones, in a page.

    python -m tools.evaluate --base --checkpoint output/checkpoint-150 --model output/merged --output
    evaluation FLAGS

FLAGS are those of trainer/main.py: --dataset and its kin, --max_seq_length, --tensor_parallel_size, --bf16.
With the --do_eval of a run, its held-out part alone is evaluated. Written are evaluation/answers.jsonl and
evaluation/index.html, which loads nothing.

Loss and perplexity are per target token; of an answer, exact match ignores white space around it, and ROUGE-L
(https://aclanthology.org/W04-1013) is the F-measure of rouge-score, here of words in Unicode's sense, case
ignored.
"""

import argparse
import html
import json
import math
import os
import re
import sys
from pathlib import Path

from model.weights.hub import in_one_line
from parallel.runtime import launch, leaves_at_once, prepare_environment, requested_world_size

# The policy forbids the page, whatever models and records hold, to run or to load anything.
PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Models side by side</title><style>
body {{ font-family: sans-serif; max-width: 90em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; margin: .6em 0 2em }}
th, td {{ border: 1px solid #bbb; padding: .4em .6em; text-align: left; vertical-align: top; overflow-wrap: anywhere }}
.text {{ white-space: pre-wrap; font-family: monospace }}  .number {{ text-align: right }}
.exact {{ background: #d8f0d8 }}  small {{ color: #666 }}  h3 {{ font-size: .9em; font-weight: normal; margin: 0 }}
</style></head><body><h1>Models side by side</h1>
<p>{count} examples of {datasets}; green answers are the expected ones, word for word.</p>
<table><tr><th>model<th>loss<th>perplexity<th>exact match<th>ROUGE-L</tr>
{totals}
</table>
{answers}
</body></html>
"""


class Words:
    """rouge-score's tokens: its own are of a-z and 0-9 alone, which leaves nothing of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def score(expected: str, answer: str) -> dict:
    """exact_match (bool) and rouge_l (0 to 1) of an answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"], tokenizer=Words()).score(expected, answer)
    return {
        "answer": answer,
        "exact_match": answer.strip() == expected.strip(),
        "rouge_l": scores["rougeL"].fmeasure,
    }


def measure(runtime, source, rows, asked, config, chosen) -> tuple[float, list[str]]:
    """(loss per target token, greedy answer to each question) of one model, on every rank."""
    import torch

    from data.loader import Loader
    from model.generation import Generator, capacity_for
    from parallel.mesh import Mesh
    from trainer.loop import evaluate

    mesh = Mesh.create(runtime.rank, runtime.world_size, config.tensor_parallel_size)
    model = source.build(
        mesh.tp,
        runtime.device,
        torch.bfloat16 if config.bf16 else torch.float32,
        sequence_parallel=config.divides_sequence,
    )
    zeros = torch.zeros(3).to(runtime.device)
    runtime.mark_step()
    loader = Loader(
        rows,
        batch_size=config.per_device_eval_batch_size,
        accumulation=1,
        dp_rank=mesh.dp.rank(),
        dp_size=mesh.dp.size(),
        seed=config.seed,
    )
    loss, _ = evaluate(runtime, model, loader, mesh, zeros)
    capacity = capacity_for(
        max(len(each.prompt) for each in asked), chosen.max_new_tokens, source.config.max_position_embeddings
    )
    generator = Generator(runtime, model, mesh.tp, min(chosen.batch_size, len(asked)), capacity)
    answers = generator.generate([each.prompt for each in asked], chosen.max_new_tokens, source.ends)
    return loss, [source.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def summarise(loss: float, scores: list[dict]) -> dict:
    """Of a model: loss, perplexity, and the means over its answers."""
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "exact_match": sum(each["exact_match"] for each in scores) / len(scores),
        "rouge_l": sum(each["rouge_l"] for each in scores) / len(scores),
    }


def write_page(totals: dict[str, dict], records: list[dict], datasets: list[str]) -> str:
    """The page of summaries and records, as answers.jsonl has these."""

    def cells(values):
        return "".join(f'<td class="number">{value}' for value in values)

    lines = [
        f"<tr><td>{html.escape(name)}"
        + cells(
            [
                f"{each['loss']:.4f}",
                f"{each['perplexity']:.4g}",
                f"{each['exact_match']:.1%}",
                f"{each['rouge_l']:.3f}",
            ]
        )
        + "</tr>"
        for name, each in totals.items()
    ]
    answers = []
    for record in records:
        head = "".join(f"<th>{html.escape(name)}" for name in ("prompt", "expected", *record["answers"]))
        texts = "".join(f'<td class="text">{html.escape(record[name])}' for name in ("prompt", "expected"))
        for each in record["answers"].values():
            kind = "text exact" if each["exact_match"] else "text"
            texts += f'<td class="{kind}">{html.escape(each["answer"])}\n<small>ROUGE-L {each["rouge_l"]:.2f}</small>'
        answers.append(
            f"<h3>{html.escape(record['where'])}</h3><table><tr>{head}</tr><tr>{texts}</tr></table>"
        )
    return PAGE.format(
        count=len(records),
        datasets=html.escape(", ".join(datasets)),
        totals="\n".join(lines),
        answers="\n".join(answers),
    )


def write_results(output: Path, sources: list, found: dict, rows, asked, datasets: list[str]) -> None:
    """Write answers.jsonl and index.html to `output`, and print a line a model."""
    from tools.show_data import write_file

    records, totals, tokenizer = [], {}, sources[0].tokenizer
    for each in asked:
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (each.prompt, each.expected)]
        records.append(
            {
                "where": rows.tokens[each.source].where(each.example),
                "prompt": texts[0],
                "expected": texts[1],
                "answers": {},
            }
        )
    for source in sources:
        loss, answers = found[source.name]
        scores = [score(record["expected"], answer) for record, answer in zip(records, answers, strict=True)]
        for record, each in zip(records, scores, strict=True):
            record["answers"][source.name] = each
        totals[source.name] = summarise(loss, scores)
        line = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in totals[source.name].items()
        )
        print(f"{source.name}: {line}")
    write_file(
        output / "answers.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    )
    write_file(output / "index.html", write_page(totals, records, datasets))
    print(output / "index.html")


def open_sources(chosen) -> list:
    """The models of the flags, each by a name of its own; raises ValueError where they cannot be read with
    one tokenizer."""
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
    from model.generation import capacity_for
    from trainer.dataset import build_rows
    from trainer.samples import questions

    if min(chosen.max_new_tokens, chosen.batch_size) < 1:
        raise ValueError("--max_new_tokens and --batch_size: at least 1 was expected")
    sources = open_sources(chosen)
    positions = min(source.config.max_position_embeddings for source in sources)
    capacity_for(1, chosen.max_new_tokens, positions)
    train, held_out, summary = build_rows(config, sources[0].tokenizer, sources[0].config)
    rows = held_out or train
    asked = questions(rows, positions - chosen.max_new_tokens)
    if not asked:
        raise ValueError(
            f"no prompt leaves room for --max_new_tokens {chosen.max_new_tokens} within {positions} positions"
        )
    print("\n".join(line for line in summary.splitlines() if line.startswith("data: ")))
    try:
        chosen.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {chosen.output} cannot be made: {error.strerror}") from None
    return sources, rows, asked


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="All other flags are those of trainer/main.py; its --help explains them.",
    )
    parser.add_argument(
        "--model", nargs="+", default=[], help="merged models, or other Llamas: directories or hub ids"
    )
    parser.add_argument(
        "--checkpoint", nargs="+", type=Path, default=[], help="directories checkpoint-<step>, not merged"
    )
    parser.add_argument("--base", action="store_true", help="the base model of the first checkpoint too")
    parser.add_argument("--base_model", help="where that is, if no longer where training read it")
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), help="a directory; default evaluation"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="the longest answer, in tokens; default 64"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="questions that are answered at once; default 8"
    )
    chosen, flags = parser.parse_known_args(arguments)
    try:
        if leaves_at_once():
            return 0
        from trainer.config import parse

        config = parse(flags)
        started = "WORLD_SIZE" in os.environ
        world_size = requested_world_size(
            config.world_size or (None if started else config.tensor_parallel_size)
        )
        prepare_environment(world_size)
        from model.llama import Llama
        from parallel.mesh import Mesh

        sources, rows, asked = prepare(chosen, config)
        for source in sources:
            Llama(source.config, Mesh.create(0, world_size, config.tensor_parallel_size).tp)
    except (ValueError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 1
    found = {}

    def program(runtime):
        for source in sources:
            measured = measure(runtime, source, rows, asked, config, chosen)
            if runtime.rank == 0:
                found[source.name] = measured

    launch(program, world_size)
    if found:
        write_results(chosen.output, sources, found, rows, asked, config.datasets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
