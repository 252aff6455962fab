"""The Python of a model card, which loads a merged model or an adapter and asks it a question."""

QUESTION = "What is the capital of France?"

MODEL_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name!r}{where}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
"""
ADAPTER_CODE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}{base_where}
name = {name!r}{where}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), name)
"""
CHAT_CODE = """\
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": {prompt!r}}}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
"""
TEXT_CODE = """\
inputs = tokenizer({prompt!r}, return_tensors="pt")
"""
ANSWER_CODE = """\
ids, mask = inputs["input_ids"], inputs["attention_mask"]
answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64)[0, ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def how_to_load(is_adapter: bool, name: str, base, prompts) -> str:
    """A block of Python in Markdown that loads the model `name` and prompts it as in training.

    base: the card.Base of an adapter. prompts: the PromptFormat.
    """
    prompt = prompts.prompt.replace("{instruction}", QUESTION)
    values = {"name": name, "where": "" if "/" in name else "  # its directory"}
    load = MODEL_CODE
    if is_adapter:
        load, values["base"] = ADAPTER_CODE, base.name
        values["base_where"] = "" if base.hub_id else "  # the directory of the base model"
        if base.random_seed is not None:
            values |= {"base": "base", "base_where": "  # its random weights: merge_checkpoint --base_only"}
    ask = (CHAT_CODE if prompts.chat else TEXT_CODE).format(prompt=prompt)
    return "```python\n" + load.format(**values) + "\n" + ask + ANSWER_CODE + "```"
