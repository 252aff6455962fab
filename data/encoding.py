"""From the texts of examples to token ids and a mask of the trained ones."""

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
from os.path import commonprefix

import numpy as np

from data.chats import Rendered


def encode(
    examples: list[Rendered], tokenizer, train_on_prompt: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [tokens], trained bool [tokens]) of each example, in order.

    A text has the tokens of its prompt, those of its answer, and one EOS; a chat has exactly what its
    template writes. Raises ValueError for a chat where the tokenizer is not a fast one.
    """
    for is_chat, run in groupby(examples, lambda example: example.spans is not None):
        yield from (_encode_chats if is_chat else _encode_texts)(list(run), tokenizer, train_on_prompt)


def encode_prompts(prompts: list[str], tokenizer) -> list[list[int]]:
    """The token ids of texts that an answer follows, or of the beginnings of plain texts.

    They begin with what the tokenizer puts before a text (BOS), once, also where the text has it already.
    What it puts after a text (EOS of some) is left out, but an EOS that stands in the text stays.
    """
    start = _start_tokens(tokenizer)
    begin = tokenizer.bos_token or ""
    texts = [text.lstrip() if begin and text.lstrip().startswith(begin) else text for text in prompts]
    encoded = []
    for ids in _encode_bare(texts, tokenizer):
        while start and ids[: len(start)] == start:
            ids = ids[len(start) :]
        encoded.append([*start, *ids])
    return encoded


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of everything in the tokenizer that determines the tokens of an example."""
    vocabulary = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    settings = [
        type(tokenizer).__name__,
        vocabulary,
        tokenizer.chat_template,
        tokenizer.bos_token,
        tokenizer.eos_token,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _encode_chats(examples, tokenizer, train_on_prompt):
    """A token is trained where a part of it is in a trained span, as in transformers."""
    if not tokenizer.is_fast:
        raise ValueError(
            "chats need a fast tokenizer (tokenizer.json), which says where in the text its tokens are"
        )
    encoded = tokenizer(
        [example.text for example in examples],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for example, ids, offsets in zip(examples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first, last = np.array(offsets, np.int64).reshape(-1, 2).T
        # Some tokenizers trim white space from the offsets: a token begins where the previous one ends.
        first = np.minimum(first, np.concatenate([[0], last[:-1]]))
        trained = np.full(len(ids), train_on_prompt)
        for spans, trains in ((example.untrained, False), (example.spans, True)):
            for start, stop in spans:
                trained[(first < stop) & ((last > start) | (first >= start))] = trains
        yield np.array(ids, np.int32), trained


def _encode_texts(examples, tokenizer, train_on_prompt):
    """Everything after the prompt is trained, the EOS too."""
    end = tokenizer.eos_token_id
    prompts = encode_prompts([example.prompt for example in examples], tokenizer)
    texts = [_trim_after_end(example.text, tokenizer.eos_token) for example in examples]
    # Prompt and answer are tokenized apart, so that a prompt has the tokens with which it is asked. Where an
    # answer's own tokens would begin with a space that nobody wrote, they are tokenized together.
    together = _puts_a_space_first(tokenizer)
    joined = [together or not example.prompt for example in examples]
    wholes = iter(
        encode_prompts(
            [e.prompt + t for e, t, join in zip(examples, texts, joined, strict=True) if join], tokenizer
        )
    )
    answers = iter(_encode_bare([t for t, join in zip(texts, joined, strict=True) if not join], tokenizer))
    for prompt, join in zip(prompts, joined, strict=True):
        ids = next(wholes) if join else prompt + next(answers)
        start = len(commonprefix([prompt, ids]))
        while len(ids) > start and ids[-1] == end:
            ids = ids[:-1]
        ids = np.array([*ids, end], np.int32)
        yield ids, (np.arange(len(ids)) >= start) | train_on_prompt


def _encode_bare(texts: list[str], tokenizer) -> list[list[int]]:
    """The token ids of texts, without what the tokenizer puts around a text."""
    if not texts:
        return []
    # verbose=False: the tokenizer would warn of long examples, which are cut later.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _start_tokens(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    (whole,) = tokenizer(["a"], verbose=False)["input_ids"]
    (bare,) = _encode_bare(["a"], tokenizer)
    return whole[: next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)]


def _puts_a_space_first(tokenizer) -> bool:
    """Whether a text begins with other tokens than it has within a text, as with Llama 2's tokenizer."""
    alone, after_sign = _encode_bare(["1", "=1"], tokenizer)  # no usual tokenizer joins a sign and a digit
    return after_sign[-len(alone) :] != alone


def _trim_after_end(text: str, end: str) -> str:
    """The text without the white space after an EOS that stands in it."""
    return text.rstrip() if text.rstrip().endswith(end) else text
