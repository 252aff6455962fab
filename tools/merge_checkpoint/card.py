"""Writes the model card (README.md) of what a merge writes: where it comes from, and how it is loaded.

What is not known is left out. Of local paths only the last part is written: the rest is the user's own.
"""

import json
import math
import os
import shlex
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from data.sources import HUB_ID
from model.weights.hub import read_json
from tools.merge_checkpoint.card_code import how_to_load
from trainer.checkpoint.reader import Checkpoint
from trainer.config import PATHS, Config
from trainer.prompts import PromptFormat

PACKAGES = ("markstep", "torch", "torch_xla", "transformers", "peft")
MOST_EVALUATIONS = 12  # rows of the table
MODEL, ADAPTER, BASE = "model", "adapter", "base"  # what the card is of


@dataclass(frozen=True)
class Base:
    """The model that training began with: its `reference` as the checkpoint has it, a hub id or a path.

    `hub_id` is None where it is a path. With `random_seed`, only its config and tokenizer were read.
    """

    reference: str
    hub_id: str | None
    random_seed: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, model_id: str | None) -> "Base":
        """The base of a checkpoint; `model_id` is where it is now, if not where training read it."""
        manifest = checkpoint.manifest
        names = [name for name in (manifest["model"], model_id) if name]
        hub_id = next((name for name in names if HUB_ID.fullmatch(name) and not os.path.exists(name)), None)
        reference = model_id or manifest["model"]
        reference = os.path.abspath(reference) if os.path.isdir(reference) else reference
        return cls(reference, hub_id, manifest["random_seed"])

    @property
    def name(self) -> str:
        """The hub id, or the last part of the path."""
        return self.hub_id or last_part(self.reference)

    def license(self) -> dict[str, str]:
        """What the base's own model card, or its config.json, says of its license. Nothing is downloaded."""
        found = {}
        if card := self._file("README.md"):
            try:
                values = ModelCard.load(card).data.to_dict()
            except Exception:  # a damaged card is no reason not to merge
                values = {}
            found = {name: values[name] for name in ("license", "license_name") if _is_text(values, name)}
            if _is_text(values, "license_link") and values["license_link"].startswith("https://"):
                found["license_link"] = values["license_link"]
        if "license" not in found and (config := self._file("config.json")):
            values = read_json(config)
            found |= {"license": values["license"]} if _is_text(values, "license") else {}
        return found

    def _file(self, name: str) -> Path | None:
        """A file of the base where it lies on this machine."""
        path = Path(self.reference) / name
        if self.hub_id and not path.is_file():
            cached = try_to_load_from_cache(self.hub_id, name)
            path = Path(cached) if isinstance(cached, str) else path
        return path if path.is_file() else None


def model_card(
    kind: str, name: str, checkpoint: Checkpoint | None, prompts: PromptFormat, model_id: str | None
) -> str:
    """The text of the card of a model, adapter or base that is called `name`: a hub id or a directory's name.

    `checkpoint`: what it was merged from; None for one of neuronx-distributed, of which nothing is known.
    """
    base = Base.of(checkpoint, model_id) if checkpoint else None
    method = [] if kind == BASE or not (checkpoint and checkpoint.lora) else ["lora"]
    data = ModelCardData(
        base_model=base.hub_id if base and base.random_seed is None else None,
        datasets=_hub_datasets(checkpoint) or None if checkpoint and kind != BASE else None,
        library_name="peft" if kind == ADAPTER else "transformers",
        pipeline_tag="text-generation",
        tags=["markstep", *method],
        **(base.license() if base else {}),
    )
    parts = [f"# {last_part(name)}", _introduction(kind, base)]
    if checkpoint and kind != BASE:
        parts += ["## Training", *_training(checkpoint, base), *_evaluation(checkpoint)]
    parts += ["## How to load it", how_to_load(kind == ADAPTER, name, base, prompts)]
    parts += ["## Versions", "At merging: " + ", ".join(_versions()) + "."]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def last_part(path: str) -> str:
    """The last part of a path or of a hub id."""
    return Path(path).name or path


def code(text: str) -> str:
    """A text as it is, in Markdown."""
    return f"`{_one_line(text)}`"


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _introduction(kind: str, base: Base | None) -> str:
    if base is None:
        return "A language model, merged from a checkpoint of neuronx-distributed by markstep."
    name = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else code(base.name)
    if base.random_seed is not None:
        name = f"random weights (seed {base.random_seed}), with configuration and tokenizer of {name}"
    if kind == BASE:
        return f"The base model of a training by markstep, without what it has learned: {name}."
    what = "A LoRA adapter" if kind == ADAPTER else "A language model"
    return f"{what}, trained with markstep from {name}."


def _training(checkpoint: Checkpoint, base: Base) -> list[str]:
    """The section on training: a list, and the flags of the run that differ from their defaults."""
    config, lora = checkpoint.manifest["config"], checkpoint.lora
    lines = [f"- Base model: {code(base.name)}" + (" (random weights)" * (base.random_seed is not None))]
    method = "all weights"
    if lora:
        scaling = "lora_alpha / sqrt(r)" if lora.use_rslora else "lora_alpha / r"
        method = f"LoRA of rank {lora.r}, lora_alpha {lora.lora_alpha:g} (scaled by {scaling}), on "
        method += ", ".join(map(code, lora.target_modules))
    if config.get("objective") == "dpo":
        method += f", by DPO (loss {config.get('dpo_loss')}, beta {config.get('dpo_beta')})"
    lines.append(f"- Trained: {method}")
    if _is_text(config, "adapter_name_or_path"):
        lines.append(f"- From the adapter: {code(last_part(config['adapter_name_or_path']))}")
    if "dataset" in config and (data := _data(checkpoint)):
        lines.append("- Data: " + ", ".join(data))
    lines.append(f"- Steps: {checkpoint.step}")
    metrics = _lines(checkpoint, "metrics.jsonl", "loss")
    if [line["step"] for line in metrics] == list(range(1, checkpoint.step + 1)):
        tokens = [line.get("target_tokens") for line in metrics]
        if all(isinstance(count, int) for count in tokens):
            lines.append(f"- Target tokens: {sum(tokens):,}")
    if metrics:
        first, last = metrics[0], metrics[-1]
        lines.append(
            f"- Training loss: {first['loss']:.4f} in step {first['step']}, "
            f"{last['loss']:.4f} in step {last['step']}"
        )
    flags = _changed_flags(config)
    shown = ["Flags that differ from their defaults:", "```text\n" + "\n".join(flags) + "\n```"]
    return ["\n".join(lines), *(shown if flags else [])]


def _data(checkpoint: Checkpoint) -> list[str]:
    """The data sets of a run, in Markdown: hub ids, and the last parts of paths."""
    names, hub = checkpoint.manifest["config"]["dataset"], _hub_datasets(checkpoint)
    if names is None:
        return ["the sample that comes with markstep"]
    links = {name: f"[{name}](https://huggingface.co/datasets/{name})" for name in hub}
    return [links.get(name, code(last_part(name))) for name in _texts(names)]


def _hub_datasets(checkpoint: Checkpoint) -> list[str]:
    """The data sets that were read from the hub; older checkpoints do not say which were."""
    manifest = checkpoint.manifest
    names = _texts(manifest["config"].get("dataset")) if "local_datasets" in manifest else []
    return [
        name
        for name in dict.fromkeys(names)
        if name not in manifest["local_datasets"] and HUB_ID.fullmatch(name)
    ]


def _texts(values: object) -> list[str]:
    """The texts in a list of a manifest, whose flags nobody has checked."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _changed_flags(config: dict) -> list[str]:
    """The flags of a run that differ from their defaults, as on a command line. Paths are left out."""
    found = []
    for each in fields(Config):
        value = config.get(each.name)
        if each.name in PATHS or value is None or value == each.default:
            continue
        values = value if isinstance(value, list) else [value]
        found.append(" ".join([f"--{each.name}", *(shlex.quote(_one_line(str(word))) for word in values)]))
    return found


def _evaluation(checkpoint: Checkpoint) -> list[str]:
    """The section on held-out examples; nothing where none was evaluated."""
    found = _lines(checkpoint, "eval.jsonl", "eval_loss")
    if not found and (loss := checkpoint.manifest["eval_loss"]) is not None:
        found = [{"step": checkpoint.step, "eval_loss": loss}]
    if not found:
        return []
    shown = found if len(found) <= MOST_EVALUATIONS else found[:1] + found[1 - MOST_EVALUATIONS :]
    # Of preference pairs: how often the chosen answer has the greater reward.
    pairs = checkpoint.manifest["config"].get("objective") == "dpo"
    rows = [
        f"| {line['step']} | {line['eval_loss']:.4f} | "
        + (_accuracy(line) if pairs else f"{math.exp(min(line['eval_loss'], 700)):.4g}")
        + " |"
        for line in shown
    ]
    title = "Held-out examples:"
    if len(shown) < len(found):
        title = f"Held-out examples, the first and the last {len(shown) - 1} of {len(found)} evaluations:"
    table = "\n".join(
        [f"| step | loss | {'accuracy' if pairs else 'perplexity'} |", "|---:|---:|---:|", *rows]
    )
    return ["## Evaluation", title, table]


def _accuracy(line: dict) -> str:
    found = line.get("eval_rewards/accuracies")
    return f"{found:.1%}" if isinstance(found, (int, float)) else ""


def _lines(checkpoint: Checkpoint, file: str, column: str) -> list[dict]:
    """The lines of a run's `file` up to the checkpoint's step in which `column` is a number.

    The file lies beside the checkpoint, or is not there; what is no such line is left out.
    """
    found = []
    path = checkpoint.path.resolve().parent / file
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            if line["step"] <= checkpoint.step and math.isfinite(line[column]):
                found.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _is_text(values: dict, name: str) -> bool:
    return isinstance(values.get(name), str) and bool(values[name].strip())
