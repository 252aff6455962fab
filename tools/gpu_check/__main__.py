"""Whether a GPU trains as the CPU does, and how fast: all of it in one command of less than ten minutes.

    python -m tools.gpu_check [fp32 bf16 resume merge speed] [--device GPU] [--output_dir gpu_check]
      [--model llama3-8b] [--max_seq_length 2048] [--rows 1 4] [--rounds 2] [--steps 6] [--peer_python PYTHON]

fp32: ten steps of the embedded tiny Llama with LoRA on the device and on XLA:CPU: losses and gradient norms
agree within 1e-6. bf16: ten steps of all its weights: losses are those of fp32 within what rounding does to
them. resume: what stopped on one device goes on on the other. merge: the logits of the merged model are those
of the checkpoint, and transformers' on the CPU. speed: a training step of a large model beside its peers
(tools.bench_peers), at one row a step and at more, with whatever recomputation fits.

Without names all of them run. Each figure is a line; the exit status is 1 where one is not as it should be.
`--device CPU` compares the CPU with itself, a rehearsal.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tools import cli
from tools.bench_peers.table import rates
from tools.compare_runs import COMPARED, compare, read_metrics
from tools.gpu_check import logits

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, STOPPED = 10, 5
LORA = ["--max_seq_length", 128, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3]
WHOLE = ["--max_seq_length", 64, "--per_device_train_batch_size", 8, "--learning_rate", 1e-4, "--lora_r", 0]
ENDS = ["--lr_scheduler_type", "constant", "--max_steps", STEPS, "--save_steps", STOPPED]
SAME, SAME_LOGITS, FASTER = 1e-6, 1e-5, 1.3
RECOMPUTED = ("none", "selective", "full")


class Check:
    """The parts, each a method. Figures are printed, and counted in `failed` where they are not as they
    should be. Programs run on the `device` that is checked, or on the `reference`, the CPU."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen, self.output, self.failed = chosen, chosen.output_dir.absolute(), 0
        self.devices = {"device": chosen.device, "reference": "CPU"}

    def say(self, what: str, value: float, limit: float, at_least: bool = False) -> None:
        """Print a figure, and how it should be."""
        good = value >= limit if at_least else value <= limit
        self.failed += not good
        expected = f"at {'least' if at_least else 'most'} {limit:.3g}"
        print(f"{'ok  ' if good else 'FAIL'} {what}: {value:.3g} ({expected})", flush=True)

    def run(self, where: str, *command) -> str:
        """What `python COMMAND` prints; raises ValueError with the end of its stderr where it fails."""
        environment = os.environ | {"PJRT_DEVICE": self.devices[where], "TQDM_DISABLE": "1"}
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            end = done.stderr.strip()[-1500:]
            raise ValueError(f"{' '.join(words[1:4])} ... ended with status {done.returncode}: {end}")
        return done.stdout

    def train(self, where: str, name: str, *flags) -> Path:
        """The output of a training run, which is run where it is not there yet."""
        output = self.output / f"{name}-{where}"
        if not (output / f"checkpoint-{STEPS}").exists():
            self.run(where, "trainer/main.py", *flags, *ENDS, "--output_dir", output)
        return output

    def lora_runs(self) -> list[Path]:
        """The outputs of the run with LoRA on the device and on the reference."""
        return [self.train(where, "lora", *LORA) for where in self.devices]

    def agree(self, what: str, reference: Path, other: Path, steps: int) -> None:
        """Say how far losses and gradient norms of two runs are apart, in that many steps."""
        differences = compare(read_metrics(reference), read_metrics(other))
        if len(differences) != steps:
            raise ValueError(f"{other} has {len(differences)} steps; {steps} were expected")
        for metric in COMPARED:
            largest = max(each[metric] for _, each in differences)
            self.say(f"{what}: {metric}, largest relative difference of {steps} steps", largest, SAME)

    def fp32(self) -> None:
        """Ten steps in fp32 on both."""
        device, reference = self.lora_runs()
        self.agree("fp32", reference, device, STEPS)

    def bf16(self) -> None:
        """Ten steps in bf16 on the device, beside fp32 on the reference.

        A rounding to bf16 is off by at most 2^-8 relative, at random. Between embedding and logits there are
        about 16 a layer and 4 more, so the loss, a difference of two logits of deviation s, is off by
        sqrt(2 n) 2^-8 s; and random logits have the loss ln V + s^2 / 2.
        """
        device = read_metrics(self.train("device", "bf16", *WHOLE, "--bf16"))
        reference = read_metrics(self.train("reference", "whole", *WHOLE, "--bf16", "false"))
        config = json.loads((ROOT / "data/sample/tiny/config.json").read_text(encoding="utf-8"))
        deviation = math.sqrt(2 * (reference[1]["loss"] - math.log(config["vocab_size"])))
        tolerance = math.sqrt(2 * (16 * config["num_hidden_layers"] + 4)) * 2**-8 * deviation
        largest = max(abs(device[step]["loss"] - reference[step]["loss"]) for step in reference)
        self.say(
            f"bf16: loss beside fp32's, largest difference of {len(reference)} steps", largest, tolerance
        )

    def resume(self) -> None:
        """What stopped on one goes on on the other."""
        device, reference = self.lora_runs()
        for where, stopped in (("reference", device), ("device", reference)):
            checkpoint = ["--resume", stopped / f"checkpoint-{STOPPED}"]
            output = self.train(where, "resumed", *LORA, *checkpoint)
            what = f"stopped on {stopped.name.split('-')[1]}, gone on on {where}"
            self.agree(what, reference, output, STEPS - STOPPED)

    def merge(self) -> None:
        """The logits of the device's checkpoint as it is, merged, and merged in transformers on the CPU."""
        checkpoint, merged = self.lora_runs()[0] / f"checkpoint-{STEPS}", self.output / "merged"
        if not merged.exists():
            self.run("reference", "-m", "tools.merge_checkpoint", checkpoint, merged, "--dtype", "float32")
        found = []
        for number, source in enumerate((("--checkpoint", checkpoint), ("--model", merged))):
            file = self.output / f"logits-{number}.npy"
            self.run("device", "-m", "tools.gpu_check.logits", *source, file)
            found.append(np.load(file))
        for what, other in (("merged on the device", found[1]), ("merged in transformers", dense(merged))):
            difference = float(np.abs(found[0] - other).max() / np.abs(found[0]).max())
            self.say(f"logits of the checkpoint, and {what}: relative difference", difference, SAME_LOGITS)

    def speed(self) -> None:
        """The table of tools.bench_peers for each number of rows; with the least recomputation that fits."""
        for rows in self.chosen.rows:
            for recomputed in RECOMPUTED:
                try:
                    said = self.run("device", *speed_command(self.chosen, rows, recomputed))
                except ValueError as error:
                    last = recomputed == RECOMPUTED[-1]
                    if last or not any(word in str(error) for word in ("memory", "RESOURCE_EXHAUSTED")):
                        raise
                    print(f"{rows} rows, recomputed {recomputed}: does not fit", flush=True)
                    continue
                print(
                    f"{rows} rows of {self.chosen.max_seq_length}, recomputed: {recomputed}\n{said}",
                    flush=True,
                )
                rounds = json.loads(speed_file(self.chosen, rows).read_text(encoding="utf-8"))
                self.compare_speed(rows, rounds)
                break

    def compare_speed(self, rows: int, rounds: list[dict[str, dict]]) -> None:
        """Say how many tokens a second markstep has for one of the plain loop's, where that ran."""
        pairs = [
            (rates(each["markstep"]), rates(each["plain_cuda"])) for each in rounds if "plain_cuda" in each
        ]
        if pairs:
            ratio = float(np.median([ours["tokens"] / theirs["tokens"] for ours, theirs in pairs]))
            self.say(f"{rows} rows: tokens/s to the plain loop's", ratio, FASTER, at_least=True)


def speed_file(chosen: argparse.Namespace, rows: int) -> Path:
    """Where the figures of bench_peers go."""
    return chosen.output_dir.absolute() / f"speed-{rows}.json"


def speed_command(chosen: argparse.Namespace, rows: int, recomputed: str) -> list:
    """The command of bench_peers for so many rows a step."""
    return [
        *("-m", "tools.bench_peers", "--model", chosen.model, "--bf16"),
        *("--max_seq_length", chosen.max_seq_length, "--tokens", rows * chosen.max_seq_length),
        *("--rounds", chosen.rounds, "--steps", chosen.steps, "--gradient_checkpointing", recomputed),
        *("--peer_python", chosen.peer_python, "--json", speed_file(chosen, rows)),
    ]


def dense(merged: Path) -> np.ndarray:
    """transformers' logits of the tokens of tools.gpu_check.logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(logits.ids(model.config.vocab_size))).logits[0].numpy()


PARTS = ("fp32", "bf16", "resume", "merge", "speed")


def main(arguments: list[str] | None = None) -> int:
    """The tool; returns its exit status."""
    parser = cli.parser("gpu_check", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--device", choices=("GPU", "CPU"), default="GPU", help="what is checked; default GPU"
    )
    parser.add_argument(
        "--output_dir", type=cli.path, default=Path("gpu_check"), help="new, or of such a check"
    )
    parser.add_argument("--model", default="llama3-8b", help="of bench_peers, for speed; default llama3-8b")
    for name, default, text in (
        ("max_seq_length", 2048, "tokens of a row, for speed"),
        ("rounds", 2, "of bench_peers"),
        ("steps", 6, "warm ones of a process of bench_peers"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default {default}")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="rows a step; default 1 and 4")
    parser.add_argument("--peer_python", default=sys.executable, help="of bench_peers")
    chosen = parser.parse_args(arguments)
    if wrong := set(chosen.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(wrong))}: {', '.join(PARTS)} were expected")
    check, begun = Check(chosen), time.monotonic()
    try:
        check.output.mkdir(parents=True, exist_ok=True)
        for part in chosen.parts or PARTS:
            getattr(check, part)()
            print(f"{part}: done after {time.monotonic() - begun:.0f} s", flush=True)
    except (ValueError, OSError) as error:
        return cli.fail(error)
    return int(check.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
