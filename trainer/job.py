"""What happens before the ranks of a run start: its inputs are read and checked, without a device."""

import fcntl
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

from data.dates import pinned_date
from data.loader import BEGINNING, Loader
from data.packing import Rows
from model.attention.flash_nki import why_not_flash
from model.config import ModelConfig
from model.lora import LoraConfig
from model.weights.hub import resolve
from model.weights.loading import check_weights
from model.weights.peft import PeftAdapter
from model.weights.shapes import base_shapes, trained_shapes
from model.weights.sources import RandomWeights, SafetensorsFiles, open_weights
from parallel import layers as native
from parallel.layer_backend import parallel_layers
from parallel.mesh import Mesh
from parallel.runtime import Peers, extracts_graphs, meet
from trainer.build import buckets_before_start, build_model
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.previous import set_previous_aside
from trainer.checkpoint.reader import Checkpoint
from trainer.config import Config
from trainer.dataset import build_rows, fingerprint
from trainer.lora_settings import lora_config, read_adapter, trained_summary
from trainer.prompts import PromptFormat, end_tokens, keep_date
from trainer.reporting.writers import check_writers, files_of_a_run
from trainer.start.facts import agree_on_model, agree_on_rows, agree_on_start
from trainer.tokenizer import load_tokenizer


@dataclass
class StopRequest:
    """Whether this process was asked to stop after its step.

    It is no threading.Event, whose `set` takes a lock: a signal's handler that interrupts a `set`, of another
    signal say, would wait for that lock for ever.
    """

    was_made: bool = False

    def make(self, *_) -> None:
        """Ask for it; may be the handler of a signal."""
        self.was_made = True


@dataclass(frozen=True)
class Job:
    """What every rank receives: the configuration, and the inputs that were read and checked for it."""

    config: Config
    model_directory: Path
    model_config: ModelConfig
    tokenizer: object
    lora: LoraConfig | None
    adapter: PeftAdapter | None
    train_rows: Rows
    eval_rows: Rows | None
    total_steps: int
    summary: str
    resume: Checkpoint | None
    identity: dict
    deadline: float | None  # the time.monotonic() at which the run must have ended
    flash_attention: bool = False
    stop_request: StopRequest = field(default_factory=StopRequest)  # of SIGTERM, or of a full disk

    @property
    def prompt_format(self) -> PromptFormat:
        """The prompts that the model expects after training: those of the first data set."""
        return PromptFormat.of(self.train_rows.tokens[0].meta["prompts"], pinned_date(self.tokenizer))

    @property
    def ends(self) -> set[int]:
        """The ids of the tokens that end an answer."""
        return end_tokens(self.model_directory, self.tokenizer, self.model_config.vocab_size)

    @property
    def model_reference(self) -> str:
        """The hub id of the base model, or the absolute path of its directory."""
        name = self.config.model_directory
        return str(self.model_directory.resolve()) if os.path.isdir(name) else name


def prepare(config: Config, world_size: int, begun: float | None = None) -> Job:
    """Read and check the inputs of a run of `world_size` ranks, and make its --output_dir.

    Raises ValueError of one line before anything is compiled or written. --max_minutes count from `begun`, a
    time.monotonic(); default: now.
    """
    begun, peers = begun or time.monotonic(), meet()
    agree_on_start(peers, config)
    mesh = Mesh.create(0, world_size, config.tensor_parallel_size, config.pipeline_parallel_size)
    layers = parallel_layers(config.parallel_layers, config.pipeline_parallel_size)
    config = config.for_ranks(mesh.dp.size())
    if peers.is_first:
        check_writers(config)

    directory = resolve(config.model_directory)
    model_config = ModelConfig.from_pretrained(directory)
    adapter = read_adapter(config, model_config)
    lora = adapter.config if adapter else lora_config(config, model_config)
    build_model(config, model_config, mesh)  # on the meta device: raises where it cannot be divided
    buckets = buckets_before_start(config, model_config, world_size, lora) if config.resume else None
    resume = find_checkpoint(config.output_dir, config.resume, config.overwrite_output_dir, buckets, peers)
    trained = trained_shapes(model_config, lora)
    weights = _open_base(config, directory, model_config, adapter, peers)
    tokenizer = load_tokenizer(directory)
    keep_date(tokenizer, resume.path if resume else None)
    end_tokens(directory, tokenizer, model_config.vocab_size)  # raises where its files are damaged

    train_rows, eval_rows, data_summary = build_rows(config, tokenizer, model_config, peers)
    identity = _identity(config, model_config, lora, weights, train_rows, peers)
    agree_on_rows(peers, config.datasets, train_rows, identity["data"])
    if resume:
        resume.check(identity)
        resume.check_tensors(trained)

    total_steps = peers.first("steps", lambda: _total_steps(config, mesh, train_rows, resume))
    rows = [rows for rows in (train_rows, eval_rows) if rows]
    flash_attention, attention_summary = peers.first(
        "attention", lambda: attention_of(config, model_config, layers, rows)
    )
    summary = [data_summary, *_start_summary(model_config, lora, resume, total_steps), attention_summary]
    if not extracts_graphs():
        _make_output_dir(config.output_dir)  # the only write here, after everything was checked
    return Job(
        config=config,
        model_directory=directory,
        model_config=model_config,
        tokenizer=tokenizer,
        lora=lora,
        adapter=adapter,
        train_rows=train_rows,
        eval_rows=eval_rows,
        total_steps=total_steps,
        summary="\n".join(summary),
        resume=resume,
        identity=identity,
        deadline=begun + 60 * config.max_minutes if config.max_minutes else None,
        flash_attention=flash_attention,
    )


def _open_base(
    config: Config, directory: Path, model_config: ModelConfig, adapter: PeftAdapter | None, peers: Peers
) -> SafetensorsFiles | RandomWeights:
    """The base model's weights, which were checked: names, shapes, and that all processes have the same."""
    weights = open_weights(directory, model_config, config.random_seed, config.depth_scaled_init)
    agree_on_model(peers, {directory: weights} | ({adapter.directory: adapter} if adapter else {}))
    check_weights(model_config, weights, compare=peers.is_first)
    return weights


def _identity(
    config: Config,
    model_config: ModelConfig,
    lora: LoraConfig | None,
    weights: SafetensorsFiles | RandomWeights,
    train_rows: Rows,
    peers: Peers,
) -> dict:
    """What a checkpoint must agree with before a run resumes from it; docs/checkpoint-format.md describes it.

    All processes hash the base weights together, and the first one of each machine its rows.
    """
    with peers.doing("hashes the base weights"):
        base = weights.fingerprint(base_shapes(model_config), peers)
    return {
        "base": base,
        "lora": asdict(lora) if lora else None,
        "seed": config.seed,
        "data": peers.first_on_node("hash of the rows", lambda: fingerprint(train_rows)),
    }


def _total_steps(config: Config, mesh: Mesh, train_rows: Rows, resume: Checkpoint | None) -> int:
    """The optimizer steps of the whole run; raises ValueError where the checkpoint has done them all."""
    loader = Loader(
        train_rows,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        dp_rank=0,
        dp_size=mesh.dp.size(),
        seed=config.seed,
        start=resume.position if resume else BEGINNING,
    )
    steps = config.max_steps if config.max_steps > 0 else loader.steps_until(config.num_train_epochs)
    if resume and resume.step >= steps:
        raise ValueError(
            f"{resume.path} has done {resume.step} of {steps} steps: nothing is left to train; "
            "raise --max_steps or --num_train_epochs"
        )
    return steps


def _start_summary(
    model_config: ModelConfig, lora: LoraConfig | None, resume: Checkpoint | None, total_steps: int
) -> list[str]:
    """Lines on what is trained, and on how the run starts, where that is not the usual way."""
    lines = [trained_summary(model_config, lora)]
    if resume:
        lines.append(f"resume: {resume.path}, after step {resume.step} of {total_steps}")
    if extracts_graphs():
        lines.append(
            "NEURON_EXTRACT_GRAPHS_ONLY=1: graphs are collected, "
            "nothing is computed or written to --output_dir"
        )
    return lines


def attention_of(
    config: Config, model_config: ModelConfig, layers: ModuleType, rows: list[Rows]
) -> tuple[bool, str]:
    """Whether flash attention can be used for all `rows`, and the summary's line on layers and attention."""
    if layers is native:
        return False, "markstep's own layers and blockwise attention"
    most_examples = max(len(group) for each in rows for group in each.groups)
    window = min(filter(None, model_config.windows), default=0)
    reason = why_not_flash(most_examples, config.max_seq_length, model_config.head_dim, config.bf16, window)
    chosen = f"blockwise attention: {reason}" if reason else "its NKI flash attention: a row is one example"
    return not reason, f"neuronx-distributed's layers, and {chosen}"


def _make_output_dir(output_dir: str) -> None:
    """Make the directory; raises ValueError where it cannot be made or written to."""
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be made: {error.strerror}") from None
    if not os.access(output_dir, os.W_OK):
        raise ValueError(f"--output_dir {output_dir} cannot be written to")


def lock(output_dir: str) -> None:
    """Keep other runs out of the directory until this process ends, however it ends.

    Raises ValueError where another run holds it.
    """
    if not meet().is_first or extracts_graphs():
        return
    try:
        descriptor = os.open(output_dir, os.O_RDONLY)
        for _ in range(10):  # tools.show_run holds it for a moment, to see whether a run goes on
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
        raise ValueError(
            f"--output_dir {output_dir} is in use by another run that has not ended: choose another"
        )
    except OSError as error:
        print(
            f"warning: --output_dir {output_dir} cannot be locked ({error.strerror}): "
            "take care that no other run uses it"
        )


def make_way(config: Config) -> None:
    """Move the run that --output_dir holds into a folder of it; raises ValueError where that cannot be."""
    if meet().is_first and not extracts_graphs():
        set_previous_aside(Path(config.output_dir), files_of_a_run(config))
