"""From the texts of examples to token ids and a mask of the trained ones."""

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from data.formats import Rendered


def encode(
    examples: list[Rendered], tokenizer, train_on_prompt: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [tokens], trained bool [tokens]) of each example, in order.

    Prompt and text are tokenized apart and an EOS ends the example; a chat has exactly what its template
    writes. Raises ValueError for a chat where the tokenizer is not a fast one.
    """
    for is_chat, run in groupby(examples, lambda example: example.spans is not None):
        yield from (_encode_chats if is_chat else _encode_texts)(list(run), tokenizer, train_on_prompt)


def without_end(ids: list[int], end: int) -> list[int]:
    """A prompt's token ids without the end of text that some tokenizers add."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


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
        for start, stop in example.spans:
            trained |= (first < stop) & ((last > start) | (first >= start))
        yield np.array(ids, np.int32), trained


def _encode_texts(examples, tokenizer, train_on_prompt):
    """Everything after the prompt is trained, the EOS too."""
    end = tokenizer.eos_token_id
    # verbose=False: the tokenizer would warn of long examples, which are cut later.
    prompts = tokenizer([example.prompt for example in examples], verbose=False)["input_ids"]
    texts = tokenizer([example.text for example in examples], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    for prompt, text in zip(prompts, texts, strict=True):
        prompt = without_end(prompt, end)
        ids = np.array([*prompt, *text, end], np.int32)
        yield ids, (np.arange(len(ids)) >= len(prompt)) | train_on_prompt
