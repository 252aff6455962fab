"""Loads the tokenizer beside a model, as transformers 4 or 5 saved it."""

from pathlib import Path

from model.weights.hub import read_json, why_not_loaded

FILES, SETTINGS = ("tokenizer.json", "tokenizer.model"), "tokenizer_config.json"


def load_tokenizer(directory: Path):
    """The Hugging Face tokenizer in `directory`; raises ValueError where there is none that can be loaded."""
    if not any((directory / name).is_file() for name in FILES):
        raise ValueError(
            f"{directory} has neither {' nor '.join(FILES)}: a tokenizer was expected beside the model"
        )
    import transformers

    kind, changes = "AutoTokenizer", {}
    if transformers.__version__.startswith("4."):
        kind, changes = _for_transformers_4(directory)
    try:
        return getattr(transformers, kind).from_pretrained(directory, trust_remote_code=False, **changes)
    except Exception as error:  # the errors of transformers have no base class in common
        for name in (*FILES[:1], SETTINGS):
            if (directory / name).is_file():
                read_json(directory / name)  # where it is no JSON object, this is the clearer error
        raise ValueError(
            f"{directory} holds no tokenizer that transformers {transformers.__version__} can load: "
            f"{why_not_loaded(_cause(error))}"
        ) from None


def _for_transformers_4(directory: Path) -> tuple[str, dict]:
    """(the name of the class that loads the tokenizer, settings in place of those in the file).

    transformers 5 calls PreTrainedTokenizerFast TokenizersBackend, and additional_special_tokens
    extra_special_tokens, which in transformers 4 is a dictionary of something else.
    """
    path, changes = directory / SETTINGS, {}
    settings = read_json(path) if path.is_file() else {}
    if isinstance(tokens := settings.get("extra_special_tokens"), list):
        changes = {"extra_special_tokens": {}, "additional_special_tokens": tokens}
    is_plain = settings.get("tokenizer_class") == "TokenizersBackend"
    return "PreTrainedTokenizerFast" if is_plain else "AutoTokenizer", changes


def _cause(error: Exception) -> Exception:
    """What was wrong, where transformers 4 asks for protobuf: it does so while it handles any error."""
    return error.__context__ if "protobuf" in str(error) and error.__context__ else error
