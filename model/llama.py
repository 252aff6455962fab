"""Llama 2, 3, 3.1 and 3.2, written in parallel layers, with Hugging Face's parameter names.

A `Llama` is one rank's part of the model. With a tensor parallel group of one it is the whole model, by the
same code.
"""

from types import ModuleType

import torch
from torch import nn
from torch_xla.utils.checkpoint import checkpoint

from model.attention.blockwise import block_size, segment_masks
from model.attention.rotary import rotary_cos_sin, rotary_frequencies
from model.config import ModelConfig
from model.decoder_layer import LayerCache, LayerInputs, LlamaDecoderLayer
from model.lora import TokenSeeds, hash_token_seeds
from model.norm import LlamaRMSNorm
from parallel import layers as native
from parallel.collectives import sum_over_stages
from parallel.layers import ParallelLayer, column_parallel, gather_inputs
from parallel.loss import linear_cross_entropy
from parallel.mesh import ALONE, Group
from parallel.pipeline import ONE_STAGE, Pipeline


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the last norm (the name prefix `model.`)."""

    def __init__(self, config: ModelConfig, layers: ModuleType, pipeline: Pipeline, **layout):
        super().__init__()
        self.embed_tokens = layers.ParallelEmbedding(
            config.vocab_size, config.hidden_size, parameter_group=pipeline.vocabulary, pad=True, **layout
        )
        self.layers = nn.ModuleList()  # this stage's, by their ids in the whole model
        for layer_id in pipeline.layer_ids(config.num_hidden_layers):
            self.layers.add_module(str(layer_id), LlamaDecoderLayer(config, layers, **layout))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **layout)


class Llama(nn.Module):
    """LlamaForCausalLM, sharded over a tensor parallel group and the stages of a pipeline."""

    def __init__(
        self,
        config: ModelConfig,
        group: Group = ALONE,
        dtype: torch.dtype = torch.float32,
        device="meta",
        gradient_checkpointing: str = "none",
        sequence_parallel: bool = False,
        layers: ModuleType = native,
        flash_attention: bool = False,
        pipeline: Pipeline = ONE_STAGE,
    ):
        """Build the modules with uninitialised parameters, which model/weights/loading.py fills.

        group: the tensor parallel ranks. dtype: of parameters and activations. gradient_checkpointing: what
        the backward computes again: none, selective (logits) or full (decoder layers and logits).
        sequence_parallel: norms and residuals are divided over `group`, too. layers: the module of the
        parallel layers, parallel.layers or parallel.nxd. flash_attention: to be used where
        model/attention/flash_nki.py says that it is right. Raises ValueError where the groups cannot divide
        the model.
        """
        super().__init__()
        check_divisible(config, group, pipeline)
        self.config, self.dtype, self.pipeline = config, dtype, pipeline
        self.gradient_checkpointing, self.flash_attention = gradient_checkpointing, flash_attention
        self.token_seeds = TokenSeeds()
        layout = {
            "dtype": dtype,
            "device": device,
            "sequence_parallel_enabled": sequence_parallel,
            "tensor_model_parallel_group": group,
        }
        self.model = LlamaModel(config, layers, pipeline, **layout)
        self.lm_head = layers.ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            bias=False,
            parameter_group=pipeline.vocabulary,
            pad=True,
            **layout,
        )
        self._mark_padding()
        self.register_buffer("stage_index", torch.tensor([pipeline.group.rank()]), persistent=False)
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rotary_frequencies", frequencies, persistent=False)
        self.tie_weights()

    def _mark_padding(self) -> None:
        """Tell the layers of this stage which of them are padding, and what their counterparts are."""
        layers = self.config.num_hidden_layers
        for layer_id, decoder_layer in self.model.layers.named_children():
            counterparts = self.pipeline.counterparts(int(layer_id), layers)
            for name, module in decoder_layer.named_modules():
                if isinstance(module, ParallelLayer):
                    module.is_padding = int(layer_id) >= layers
                    module.counterparts = [f"model.layers.{other}.{name}" for other in counterparts]
        # The last stage's norm is in front of the head; what the other stages compute there is not used.
        self.model.norm.is_padding = self.lm_head.input_is_padding = not self.pipeline.is_last

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def rank_index(self) -> torch.Tensor:
        """This rank's place among those that divide the vocabulary, as data: integer [1] on the model's
        device."""
        return self.model.embed_tokens.rank_index

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        row_seeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The logits of a model of one stage, all at once. Inputs and result are those of `hidden_states` and
        `head`; a loss is had with less memory (`token_losses`)."""
        x = self.hidden_states(input_ids, position_ids, segment_ids, row_seeds)
        return self.head(x, len(input_ids), self.dropout_seeds(row_seeds, input_ids.shape[1]))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        row_seeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the last decoder layer of a model of one stage returns, [tokens, features]. Several stages
        pass a batch on in ticks (model/stage.py).

        Inputs are [batch, sequence], row_seeds [batch].
        """
        return self.stage(self.embed(input_ids), self.layer_inputs(position_ids, segment_ids, row_seeds))

    @property
    def vocabulary_group(self) -> Group:
        """The ranks that divide the vocabulary: the tensor parallel ranks of all pipeline stages."""
        return self.model.embed_tokens.parameter_group

    def token_losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, row_seeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of the last stage's hidden states [tokens, features], without its logits in one piece.

        labels are [batch, sequence], row_seeds [batch]. Returns (the cross entropy in nats of each target, 0
        where there is none; the logarithm of the sum of each token's exp(logits)), fp32 [batch, sequence].
        Both have a gradient (parallel/loss.py).
        """
        sequence = labels.shape[1]
        seeds = self.dropout_seeds(row_seeds, sequence) if self.lm_head.has_adapter else None
        with self.token_seeds.during(seeds):
            x, low_rank = gather_inputs(self.model.norm(hidden), [self.lm_head], self._from_last_stage)
        results = linear_cross_entropy(
            self.lm_head.factors(x, *low_rank.values()),
            labels.t().flatten(),
            self.rank_index,
            self.config.vocab_size,
            self.vocabulary_group,
            recompute=self.gradient_checkpointing != "none",
        )
        losses, log_sum_exp = (each.unflatten(0, (sequence, -1)).t() for each in results)
        return losses, log_sum_exp

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] -> [tokens, features]."""
        return sum_over_stages(self.model.embed_tokens(input_ids.t()).flatten(0, 1), self.pipeline.group)

    def layer_inputs(
        self, position_ids: torch.Tensor, segment_ids: torch.Tensor, row_seeds: torch.Tensor | None = None
    ) -> LayerInputs:
        """Rotary angles, masks and dropout seeds of rows [batch, sequence]; row_seeds [batch] where LoRA may
        drop."""
        cos, sin = rotary_cos_sin(position_ids.t(), self.rotary_frequencies)
        masks = None
        if not self.flash_attention:
            masks = segment_masks(segment_ids, block_size(segment_ids.shape[1]))
        return LayerInputs(cos, sin, masks, self.dropout_seeds(row_seeds, position_ids.shape[1]))

    def dropout_seeds(self, row_seeds: torch.Tensor | None, sequence: int) -> torch.Tensor | None:
        """The seeds of LoRA's dropout, int32 [sequence, batch] from row_seeds [batch]; None where nothing is
        dropped."""
        drops = row_seeds is not None and self.training and self.token_seeds.dropout > 0
        return hash_token_seeds(row_seeds, sequence) if drops else None

    def stage(
        self, x: torch.Tensor, inputs: LayerInputs, caches: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """This stage's decoder layers: x [tokens, features] -> the same shape."""

        def run(x, layer, cos, sin, inputs, cache=None):
            # cos and sin are arguments of their own, because a checkpoint saves the tensors among its
            # arguments.
            with self.token_seeds.during(inputs.token_seeds):
                return layer(x, LayerInputs(cos, sin, inputs.masks, inputs.token_seeds), cache)

        checkpoints = self.gradient_checkpointing == "full" and torch.is_grad_enabled()
        if checkpoints:
            # A re-entrant checkpoint has gradients only where its input needs one, which a frozen embedding's
            # does not.
            x.requires_grad_(True)
        for layer, cache in zip(self.model.layers, caches or [None] * len(self.model.layers), strict=True):
            layer_input, arguments = x, (x, layer, inputs.cos, inputs.sin, inputs)
            x = (
                checkpoint(run, *arguments, preserve_rng_state=False)
                if checkpoints
                else run(*arguments, cache)
            )
        return self.pipeline.skip_padding(layer_input, x, self.config.num_hidden_layers, self.stage_index)

    def head(self, x: torch.Tensor, batch: int, token_seeds: torch.Tensor | None = None) -> torch.Tensor:
        """The last stage's x [tokens, features] -> logits, [batch, sequence, this rank's part of the
        vocabulary]."""
        with self.token_seeds.during(token_seeds):
            [logits] = column_parallel(self.model.norm(x), [self.lm_head], self._from_last_stage)
        return logits.unflatten(0, (-1, batch)).transpose(0, 1)

    def _from_last_stage(self, tensor):
        return self.pipeline.from_last_stage(tensor, self.stage_index)


def check_divisible(config: ModelConfig, group: Group, pipeline: Pipeline = ONE_STAGE) -> None:
    """Raise ValueError where the tensor parallel group and the pipeline stages cannot divide the model."""
    pipeline.layer_ids(config.num_hidden_layers)
    for field in ("num_attention_heads", "intermediate_size"):
        if getattr(config, field) % group.size():
            raise ValueError(
                f"the model's {field} {getattr(config, field)} is not divisible by the tensor parallel size "
                f"{group.size()}"
            )
    kv_heads = config.num_key_value_heads
    if kv_heads % group.size() and group.size() % kv_heads:
        raise ValueError(
            f"the model's num_key_value_heads {kv_heads} neither divides the tensor parallel size "
            f"{group.size()} nor is divisible by it"
        )
