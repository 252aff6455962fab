"""How a configuration becomes a model."""

from parallel.mesh import Mesh


def build(config, model_config, mesh: Mesh):
    """The rank's model on the meta device, as the loop builds it; raises ValueError where it cannot be divided."""
    import torch

    from model.llama import Llama
    from model.lora import add_lora
    from parallel.pipeline import Pipeline
    from trainer.job import lora_config

    if config.max_seq_length > model_config.max_position_embeddings:
        raise ValueError(
            f"--max_seq_length {config.max_seq_length} is more than the model's positions "
            f"(max_position_embeddings {model_config.max_position_embeddings})"
        )
    model = Llama(
        model_config,
        mesh.tp,
        torch.bfloat16 if config.bf16 else torch.float32,
        sequence_parallel=config.divides_sequence,
        pipeline=Pipeline(mesh.pp, mesh.model, config.pipeline_microbatches),
    )
    lora = lora_config(config)
    if lora:
        add_lora(model, lora)
    return model
