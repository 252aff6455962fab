"""Model cards: what of a run is in them, that nothing is invented or private, and that their code runs."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from tests.model.test_generation import save_lora
from tests.support.models import save_llama
from tests.support.saved import forge
from tests.tools.test_nxd_checkpoint import save_nxd
from tests.trainer.test_faults import save_tiny
from tools.merge_checkpoint.card import MOST_EVALUATIONS
from tools.merge_checkpoint.merging import merge

SECTIONS = ["## Training", "## Evaluation", "## How to load it", "## Versions"]


def card_of(checkpoint, output, **options):
    merge(checkpoint, output, **options)
    return ModelCard.load(output / "README.md")


def write_lines(path, lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def run_of(checkpoint, config, **values):
    """Let the manifest say that the run had these flags."""
    forge(checkpoint, lambda manifest: manifest | {"config": manifest["config"] | config} | values)


def test_what_a_run_was(tmp_path):
    checkpoint = save_lora(tmp_path)
    forge(checkpoint, lambda manifest: manifest | {"step": 3})
    run_of(
        checkpoint,
        {
            "dataset": ["owner/questions", "/home/user/private/mine.jsonl", "folder/answers"],
            "learning_rate": 0.01,
            "data_cache_dir": "/home/user/cache",
            "lr_scheduler_type": "cosine",
            "a_flag_of_before": 3,
        },
        local_datasets=["/home/user/private/mine.jsonl", "folder/answers"],
    )
    steps = [{"step": step, "loss": 8.0 / step, "target_tokens": 1000 + step} for step in (1, 2, 3, 4)]
    write_lines(tmp_path / "metrics.jsonl", steps)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a run that was killed
    losses = [{"step": 0, "eval_loss": 6.0}, {"step": 3, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}]
    write_lines(tmp_path / "eval.jsonl", losses)
    card = card_of(checkpoint, tmp_path / "merged")
    assert card.data.to_dict() == {
        "datasets": ["owner/questions"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["markstep", "lora"],
    }
    assert re.findall("^## .*", card.text, re.MULTILINE) == SECTIONS
    for line in (
        "# merged",
        "A language model, trained with markstep from `base`.",
        "- Base model: `base`",
        "- Trained: LoRA of rank 4, lora_alpha 0.1 (scaled by lora_alpha / r), on `q_proj`, `v_proj`, "
        "`o_proj`, `down_proj`",
        "- Data: [owner/questions](https://huggingface.co/datasets/owner/questions), `mine.jsonl`, `answers`",
        "- Steps: 3",
        "- Target tokens: 3,006",
        "- Training loss: 8.0000 in step 1, 2.6667 in step 3",
        "--learning_rate 0.01\n--lr_scheduler_type cosine\n```",
        "| 0 | 6.0000 | 403.4 |\n| 3 | 2.0000 | 7.389 |\n\n##",
    ):
        assert f"\n{line}" in card.text, line
    assert "/home" not in str(card) and str(tmp_path) not in str(card) and "a_flag_of_before" not in str(card)
    assert re.search(r"At merging: markstep \S+, torch 2.9.*, transformers ", card.text)


def test_what_is_not_known_is_not_there(tmp_path):
    """An older checkpoint without flags and without the files of its run."""
    checkpoint, _ = save_tiny(tmp_path, 3)
    forge(checkpoint, lambda manifest: manifest | {"config": {}})
    forge(checkpoint, lambda manifest: {k: v for k, v in manifest.items() if k != "local_datasets"})
    text = card_of(checkpoint, tmp_path / "merged").text
    assert re.findall("^- .*", text, re.MULTILINE) == [
        "- Base model: `tiny` (random weights)",
        "- Trained: all weights",
        "- Steps: 3",
    ]
    assert "## Evaluation" not in text and "Flags" not in text
    run_of(checkpoint, {"dataset": ["owner/perhaps", "/home/user/mine.jsonl"]})
    card = card_of(checkpoint, tmp_path / "again")
    assert card.data.datasets is None and "- Data: `perhaps`, `mine.jsonl`" in card.text


def test_many_evaluations_are_the_first_and_the_last(tmp_path):
    checkpoint, _ = save_tiny(tmp_path, 30)
    write_lines(tmp_path / "eval.jsonl", [{"step": step, "eval_loss": 1.0} for step in range(31)])
    text = card_of(checkpoint, tmp_path / "merged").text
    steps = [int(step) for step in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert steps == [0, *range(31 - MOST_EVALUATIONS + 1, 31)] and "the first and the last 11 of 31" in text


def test_a_base_on_the_hub_and_its_license(tmp_path, monkeypatch):
    checkpoint = save_lora(tmp_path)
    base = tmp_path / "base"
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ndatasets: [a/b]\n---\n# The base\n"
    )
    card = card_of(checkpoint, tmp_path / "merged", base_only=True)
    assert card.data.license == "other" and card.data.license_name == "llama3"
    assert card.data.datasets is None and "The base\n" not in card.text and "license_link" not in str(card)
    assert "without what it has learned: `base`" in card.text and "## Training" not in card.text
    monkeypatch.setattr(
        "tools.merge_checkpoint.card.try_to_load_from_cache", lambda name, file: str(base / file)
    )
    run_of(checkpoint, {}, model="owner/base")
    card = card_of(checkpoint, tmp_path / "adapter", adapter_only=True, hub_id="me/adapter")
    assert (card.data.base_model, card.data.license) == ("owner/base", "other")
    assert card.data.library_name == "peft" and "name = 'me/adapter'\n" in card.text
    assert "A LoRA adapter, trained with markstep from [owner/base](https://huggingface.co/owner/base)." in (
        card.text
    )
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/base"
    run_of(checkpoint, {}, random_seed=42)
    card = card_of(checkpoint, tmp_path / "random", adapter_only=True)
    assert card.data.base_model is None and "from random weights (seed 42), with configuration" in card.text


def test_a_checkpoint_of_which_nothing_is_known(tmp_path):
    from model.config import ModelConfig

    state = save_llama(tmp_path / "base").state_dict()
    save_nxd(tmp_path / "nxd", ModelConfig.from_pretrained(tmp_path / "base"), state, tp=2, pp=1)
    card = card_of(tmp_path / "nxd", tmp_path / "merged", model_id=str(tmp_path / "base"))
    assert "merged from a checkpoint of neuronx-distributed" in card.text and "## Training" not in card.text
    assert card.data.base_model is None and str(tmp_path) not in str(card)


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_runs(tmp_path, monkeypatch, capsys, chat):
    """As it stands in the card, of a model and of an adapter: the same answer from both."""
    checkpoint = save_lora(tmp_path)
    if chat:
        from tests.support.saved import list_files

        template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
        for directory in (checkpoint, tmp_path / "base"):
            (directory / "chat_template.jinja").write_text(template)
        (checkpoint / "prompt_format.json").unlink()
        list_files(checkpoint)
    monkeypatch.chdir(tmp_path)
    answers = []
    for name, only in (("merged", False), ("adapter", True)):
        card = card_of(checkpoint, tmp_path / name, adapter_only=only)
        [block] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert ("apply_chat_template" in block) == chat and block.count("capital of France") == 1
        exec(block, {})
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 20
