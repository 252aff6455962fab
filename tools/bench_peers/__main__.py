"""A training step of markstep beside trl's and beside a plain loop on torch_xla: same model, same data, same
tokens a step.

    pip install trl==1.16.0 accelerate
    python -m tools.bench_peers [--rounds 3] [--steps 5] [--max_seq_length 512] [--tokens 4096] [--huge_pages]
    [--json FILE]

Each side is a process of its own on this machine's CPU (tools/bench_peers/peers.py; markstep's is
tools.bench_step), one after the other in rounds that alternate in direction. A side that is not installed is
left out. The model is a Llama with random weights: 6 layers, hidden 512, vocabulary 8192, fp32, LoRA r 16 on
all linear layers. The examples have lengths such as dolly's, cut to a row.

Tokens are those of prompts and answers, not padding; target tokens those of answers alone. A side's seconds
are the median of its warm steps. Its share of the GEMM peak counts the products of all positions, by the
formula and the peak of tools.bench_step in the same round. markstep starts itself with huge pages, its peers
have them with --huge_pages.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tools.bench_pack import LONGEST, MEAN, MEDIAN, SHORTEST
from tools.bench_peers.peers import FILES

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDES = {
    "markstep": "markstep, packed",
    "trl": "trl, packed (bfd)",
    "trl_padded": "trl, padded to the maximum",
    "plain": "plain loop on torch_xla, full rows",
}
NEEDS = {
    "markstep": (),
    "trl": ("trl", "accelerate", "peft"),
    "trl_padded": ("trl", "accelerate", "peft"),
    "plain": ("peft",),
}
PACKAGES = ("torch", "torch_xla", "transformers", "peft", "trl", "accelerate", "numpy")


def make(directory: Path, model: dict, settings: dict, examples: int = 1000, seed: int = 0) -> None:
    """Write a model's config, a tokenizer of as many words as its vocabulary has, and examples of random
    words.

    settings: row_length, rows of a step, steps, warmup. Log-normal lengths, cut to a row; 30 to 70 % of each
    is the prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, model["vocab_size"]))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(model), encoding="utf-8")
    (directory / FILES["settings"]).write_text(json.dumps(settings), encoding="utf-8")
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(MEDIAN), np.sqrt(2 * np.log(MEAN / MEDIAN)), examples).clip(
        SHORTEST, LONGEST
    )
    with open(directory / FILES["data"], "w", encoding="utf-8") as file:
        for length in np.minimum(lengths.round().astype(int), settings["row_length"]):
            chosen = [
                words[number] for number in rng.integers(3, len(words), length - 1)
            ]  # an EOS comes behind
            prompt = int(length * rng.uniform(0.3, 0.7))
            file.write(
                json.dumps({"prompt": " ".join(chosen[:prompt]), "completion": " ".join(chosen[prompt:])})
                + "\n"
            )


def missing(side: str) -> list[str]:
    """The packages that a side lacks."""
    return [name for name in NEEDS[side] if find_spec(name) is None]


def run(side: str, directory: Path, settings: dict, huge_pages: bool = False) -> dict:
    """Run a side in a process of its own, and return what it measured; raises ValueError with the end of what
    it said."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if side == "markstep":
        figures = directory / "markstep.json"
        program = [
            "tools.bench_step",
            "--steps",
            settings["steps"],
            "--warmup",
            settings["warmup"],
            "--json",
            figures,
            *flags_of(directory, settings),
        ]
    else:
        program = ["tools.bench_peers.peers", side, directory]
        environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge_pages else {}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, program)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{side} ended with status {done.returncode}: {done.stderr.strip()[-1500:]}")
    return json.loads(
        figures.read_text(encoding="utf-8") if side == "markstep" else done.stdout.splitlines()[-1]
    )


def flags_of(directory: Path, settings: dict) -> list:
    """The flags with which markstep trains the model on the data."""
    return [
        "--model_id",
        directory,
        "--random_weights",
        "--dataset",
        directory / FILES["data"],
        "--data_cache_dir",
        directory / FILES["tokens"],
        "--max_seq_length",
        settings["row_length"],
        "--per_device_train_batch_size",
        settings["rows"],
        "--lora_r",
        16,
        "--lora_alpha",
        32,
        "--lr_scheduler_type",
        "constant",
    ]


def step_instructions(directory: Path, settings: dict) -> int:
    """HLO instructions of markstep's step, by tools.bench_compile."""
    figures, model = directory / "graph.json", directory / "config.json"
    flags = map(str, flags_of(directory, settings)[3:])  # its --model takes the place of --model_id
    subprocess.run(
        [sys.executable, "-m", "tools.bench_compile", "--model", model, "--json", figures, *flags],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return json.loads(figures.read_text(encoding="utf-8"))["graphs"]["step"]["instructions"]


def rates(measured: dict) -> dict[str, float]:
    """Tokens, target tokens and positions a second, of what either program measured."""
    if "seconds" in measured:
        return {
            name: measured[name] / float(np.median(measured["seconds"]))
            for name in ("tokens", "target_tokens", "positions")
        }
    names = {"tokens": "tokens", "target_tokens": "target_tokens", "positions": "padded_tokens"}
    return {name: measured[f"{theirs}_per_second"] for name, theirs in names.items()}


def spread(values) -> str:
    """median (least - most)."""
    return f"{np.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def table(rounds: list[dict[str, dict]]) -> list[str]:
    """A line a side of what each round measured: rates are medians over the rounds, ratios are taken within a
    round."""
    said = ["| | tokens/s | target tokens/s | markstep to it | of the GEMM peak |", "|---|---|---|---|---|"]
    ours = [rates(each["markstep"]) for each in rounds]
    share = [each["markstep"]["mfu"] / rate["positions"] for each, rate in zip(rounds, ours, strict=True)]
    for side in rounds[0]:
        rate = [rates(each[side]) for each in rounds]
        ratios = [own["tokens"] / each["tokens"] for own, each in zip(ours, rate, strict=True)]
        shares = [each["positions"] * part for each, part in zip(rate, share, strict=True)]
        said.append(
            f"| {SIDES[side]} | {np.median([each['tokens'] for each in rate]):.0f} "
            f"| {np.median([each['target_tokens'] for each in rate]):.0f} | {spread(ratios)} | {np.median(shares):.0%} |"
        )
    return said


def versions() -> str:
    """Python's and those of the packages that are installed."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_peers", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    for name, default, text in (
        ("rounds", 3, "of all sides"),
        ("steps", 5, "warm ones of a process"),
        ("max_seq_length", 512, "tokens of a row"),
        ("tokens", 4096, "of a step, padding included"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default {default}")
    parser.add_argument(
        "--huge_pages", action="store_true", help="markstep's peers get large allocations in huge pages too"
    )
    parser.add_argument("--json", type=Path, help="where the figures of each round go")
    chosen = parser.parse_args(arguments)
    rows, rest = divmod(chosen.tokens, max(chosen.max_seq_length, 1))
    if min(chosen.rounds, chosen.steps, rows) < 1 or chosen.max_seq_length < SHORTEST or rest:
        parser.error(
            f"--rounds, --steps: at least 1 was expected; --max_seq_length: at least {SHORTEST}; --tokens: a multiple "
            "of it"
        )
    if chosen.json and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: a file in a directory that exists was expected")
    settings = {"row_length": chosen.max_seq_length, "rows": rows, "steps": chosen.steps, "warmup": 3}
    sides = [side for side in SIDES if not missing(side)]
    for side in SIDES:
        if side not in sides:
            print(f"{SIDES[side]}: left out, {', '.join(missing(side))} not installed")
    print(
        f"{versions()}\n{rows} rows of {chosen.max_seq_length} a step, {chosen.steps} warm steps a process, {chosen.rounds} "
        f"rounds, peers {'with' if chosen.huge_pages else 'without'} huge pages",
        flush=True,
    )
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make(directory, MODEL, settings)
        try:
            for number in range(chosen.rounds):
                measured = {}
                for side in sides[:: -1 if number % 2 else 1]:
                    measured[side] = run(side, directory, settings, chosen.huge_pages)
                    print(
                        f"round {number + 1}: {SIDES[side]}: {rates(measured[side])['tokens']:.0f} tokens/s",
                        flush=True,
                    )
                found.append({side: measured[side] for side in sides})
                if chosen.json:
                    chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print("\n".join(table(found)))
        if "plain" in sides:
            own, plain = step_instructions(directory, settings), found[0]["plain"]["instructions"]
            print(
                f"HLO instructions of a step: markstep {own}, the plain loop {plain}: {1 - own / plain:.0%} fewer; "
                f"the plain loop recompiled {found[0]['plain']['recompilations']} times in its warm steps"
            )
    if "trl" in sides:
        print(f"trl's packed examples do not see each other: {[each['trl']['isolated'] for each in found]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
