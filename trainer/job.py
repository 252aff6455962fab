"""A run before its ranks start: everything that can be read and refused without a device."""
import hashlib
import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data.loader import Loader
from data.packing import Rows, build_rows, pack
from data.records import load_records, split, tokenize
from model.adapters import PeftAdapter
from model.files import in_one_line, resolve
from model.llama import Llama, LlamaConfig
from model.lora import LoraConfig
from model.weights import base_shapes, check_weights, open_weights, trained_shapes
from parallel.mesh import Mesh
from trainer.checkpoint import Checkpoint, find_checkpoint
from trainer.config import Config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Job:
    """What every rank is given: the configuration, and what was read because of it."""

    config: Config
    model_directory: Path
    model_config: LlamaConfig
    tokenizer: object
    lora: LoraConfig | None
    adapter: PeftAdapter | None
    train_rows: Rows
    eval_rows: Rows | None
    total_steps: int
    summary: str
    resume: Checkpoint | None
    identity: dict

    @property
    def read_trained(self):
        """(name, shard) -> the first value of what is trained, of the checkpoint or the adapter that the run goes on from."""
        if self.resume:
            return partial(self.resume.read, "parameter")
        return self.adapter and self.adapter.read

    @property
    def model_reference(self) -> str:
        """The hub id of the base model, or the absolute path of its directory."""
        name = self.config.model_directory
        return str(self.model_directory.resolve()) if os.path.isdir(name) else name


def prepare(config: Config, world_size: int) -> Job:
    """Read and check everything; raises ValueError, in one line, before anything is compiled or written."""
    mesh = Mesh.create(0, world_size, config.tensor_parallel_size)
    resume = find_checkpoint(config.output_dir, config.resume)
    directory = resolve(config.model_directory)
    model_config = LlamaConfig.from_pretrained(directory)
    if config.max_seq_length > model_config.max_position_embeddings:
        raise ValueError(f"--max_seq_length {config.max_seq_length} is more than the model's positions "
                         f"(max_position_embeddings {model_config.max_position_embeddings})")
    adapter = None
    if config.adapter_name_or_path:
        adapter = PeftAdapter(resolve(config.adapter_name_or_path, "--adapter_name_or_path"))
    lora = adapter.config if adapter else lora_config(config)
    Llama(model_config, mesh.tp)                # on the meta device: whether the layers can be divided
    trained = trained_shapes(model_config, lora)
    if adapter:
        adapter.check(trained)
    weights = open_weights(directory, model_config, config.random_seed)
    check_weights(model_config, weights)
    tokenizer = load_tokenizer(directory)
    train_rows, eval_rows, summary = _rows(config, tokenizer, model_config)
    loader = Loader(train_rows, batch_size=config.per_device_train_batch_size, accumulation=config.gradient_accumulation_steps,
                    dp_rank=0, dp_size=mesh.dp.size(), seed=config.seed)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * loader.steps_per_epoch)
    identity = {
        "base": weights.fingerprint(base_shapes(model_config)), "lora": asdict(lora) if lora else None, "seed": config.seed,
        "data": _fingerprint(train_rows), "global_batch": loader.global_batch}
    if resume:
        resume.check(identity)
        resume.check_tensors(trained)
        if resume.step >= steps:
            raise ValueError(f"{resume.path} has done {resume.step} of {steps} steps: nothing is left to train; "
                             "raise --max_steps or --num_train_epochs")
    # The one thing that is written here, after everything was checked.
    try:
        os.makedirs(config.output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {config.output_dir} cannot be made: {error.strerror}") from None
    if not os.access(config.output_dir, os.W_OK):
        raise ValueError(f"--output_dir {config.output_dir} cannot be written to")
    return Job(config, directory, model_config, tokenizer, lora, adapter, train_rows, eval_rows, steps, summary, resume,
               identity)


def lora_config(config: Config) -> LoraConfig | None:
    """The LoRA of the flags; None where all weights are trained."""
    targets = tuple(name.strip() for name in config.lora_target_modules.split(",") if name.strip())
    if not config.lora_r:
        return None
    if not targets:
        raise ValueError("--lora_target_modules names no module; pass --lora_r 0 to train without LoRA")
    return LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout, targets, config.use_rslora)


def load_tokenizer(directory: Path):
    """The Hugging Face tokenizer in `directory`; raises ValueError where there is none."""
    from transformers import AutoTokenizer
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{directory} has neither {' nor '.join(TOKENIZER_FILES)}: a tokenizer was expected beside the model")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:          # what transformers raises for odd files has no base class
        raise ValueError(f"{directory} holds no tokenizer that transformers can load: {in_one_line(error)}") from None


def _rows(config, tokenizer, model_config):
    records = load_records(config.dataset_path)
    examples, truncated, dropped = tokenize(records, tokenizer, config.max_seq_length)
    highest = max(int(example.input_ids.max()) for example in examples)
    if highest >= model_config.vocab_size:
        raise ValueError(f"the tokenizer gives token {highest}, and the model's vocabulary has {model_config.vocab_size}: "
                         "tokenizer and model do not belong together")
    held_out = []
    if config.do_eval:
        examples, held_out = split(examples, config.validation_split_percentage, config.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def rows(chosen):
        lengths = [len(example.input_ids) for example in chosen]
        groups = pack(lengths, config.max_seq_length) if config.packing else [[index] for index in range(len(chosen))]
        return build_rows(chosen, groups, config.max_seq_length, pad)

    train = rows(examples)
    summary = (f"data: {len(examples)} examples in {len(train)} rows of {config.max_seq_length} tokens, {train.efficiency:.1%} "
               f"filled; {truncated} truncated, {dropped} dropped for having no target left; {len(held_out)} held out")
    return train, rows(held_out) if held_out else None, summary


def _fingerprint(rows: Rows) -> str:
    digest = hashlib.sha256(rows.input_ids.tobytes())
    digest.update(rows.labels.tobytes())
    return digest.hexdigest()
