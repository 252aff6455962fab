"""Encoding of texts: one BOS, one EOS, and no space that only the tokenizer puts before an answer."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.chats import Rendered
from data.encoding import encode, encode_prompts
from trainer.config_derived import SAMPLE
from trainer.prompts import text_ids


def with_spaces(kind):
    """A tokenizer that writes a space before a text, by Llama 2's normalizer or its newer pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words = pre_tokenizers.Split("▁", "merged_with_next")
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = words
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator((SAMPLE / "instructions.jsonl").read_text().splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["tiny", "normalizer", "first", "always"])
def tokenizer(request):
    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    return with_spaces(request.param)


def encode_one(tokenizer, prompt, text, train_on_prompt=False):
    ((ids, trained),) = encode([Rendered(prompt, text, prompt or text)], tokenizer, train_on_prompt)
    return ids.tolist(), trained.tolist()


@pytest.mark.parametrize(
    "text",
    [
        "<s>[INST] What is the capital of France? [/INST] The capital is Paris. </s>",
        "<s>What?",
        "What?</s>",
        "\n<s>What?</s>\n",
        "<s><s>What?</s></s>",
        "<s>One</s><s>Two</s>",
    ],
)
def test_a_text_with_markers_has_one_of_each(tokenizer, text):
    ids, trained = encode_one(tokenizer, "", text)
    written = (
        text.strip().removeprefix("<s><s>").removeprefix("<s>").removesuffix("</s>").removesuffix("</s>")
    )
    begin = "<s>" if text.lstrip().startswith("<s>") else ""
    inner = tokenizer(begin + written, add_special_tokens=False)["input_ids"]
    assert ids == ([] if begin else [1]) + inner + [2]
    assert trained == [False] + [True] * (len(ids) - 1)


def test_a_prompt_keeps_its_markers(tokenizer):
    for prompt, text in [
        ("What is the capital of France?</s>", "Paris."),
        ("<s>What is it?</s>", "Paris.</s>"),
        ("What?</s>\n", "Paris.</s>\n"),
    ]:
        ids, trained = encode_one(tokenizer, prompt, text)
        begun = tokenizer(prompt.removeprefix("<s>"))["input_ids"]
        if prompt.startswith("<s>"):
            begun = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(begun)] == begun == text_ids(tokenizer, prompt) and ids.count(1) == 1
        assert trained == [False] * len(begun) + [True] * (len(ids) - len(begun))
        assert ids[-1] == 2 and ids.count(2) == 2


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("2+2=", "4"),
        ("def f(", "x): return x"),
        ("The capital of France is", " Paris."),
        ("### Answer\n", "Paris"),
        ("Ja", "va"),
        ("Question: ", "yes"),
    ],
)
def test_an_answer_has_no_space_that_nobody_wrote(tokenizer, prompt, text):
    """The tokens are those of prompt and answer together; trained are those that the prompt alone has not."""
    ids, trained = encode_one(tokenizer, prompt, text)
    alone, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + text)["input_ids"] + [2]
    if tokenizer.name_or_path.endswith("tiny"):  # writes no space: a prompt has the tokens that it has alone
        whole = alone + tokenizer(text, add_special_tokens=False)["input_ids"] + [2]
    shared = next((n for n, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    assert ids == whole and trained == [False] * shared + [True] * (len(ids) - shared)
    assert all(encode_one(tokenizer, prompt, text, train_on_prompt=True)[1])


def test_the_prompts_of_a_batch(tokenizer):
    prompts = ["One", "<s>Two", "", "Three</s>"]
    one, two, nothing, three = encode_prompts(prompts, tokenizer)
    assert nothing == [1] and one == tokenizer("One")["input_ids"] and three[-1] == 2 and two[:2] != [1, 1]


def test_the_example_of_the_sample_has_the_tokens_that_it_had():
    """Tokenizers that write no space are encoded as they were."""
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "tiny")
    record = json.loads((SAMPLE / "instructions.jsonl").read_text().splitlines()[0])
    ids, trained = encode_one(tokenizer, record["instruction"], record["response"])
    prompt = tokenizer(record["instruction"])["input_ids"]
    assert ids == prompt + tokenizer(record["response"], add_special_tokens=False)["input_ids"] + [2]
    assert trained.index(True) == len(prompt)
