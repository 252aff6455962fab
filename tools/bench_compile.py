"""What a training step will cost, from the graph of the real one, before a machine is rented: nothing is executed.

    python -m tools.bench_compile --model llama3-8b --world_size 32 --tensor_parallel_size 8 --max_seq_length 2048 --lora_r 16 \
      --bf16 [--compile] [--save_hlo DIRECTORY] [--json FILE] [any other flag of trainer/main.py]

Runs trainer/loop.py for rank 0 of the world, up to where each graph would be executed (tools/tracing.py), and reads its HLO
(tools/hlo.py); the products are compared with a closed formula (tools/flops.py). A model is a name or a config.json; no weights
are read, no cluster is needed, and flags that say which data are read change nothing. Everything that is reported is of one core.
`--save_hlo` writes each graph as a serialised HloModuleProto, for an offline compiler.
"""
import argparse
import json
import os
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.mesh import Mesh
from parallel.runtime import prepare_environment
from tools.hlo import Graph

LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192}
LLAMA31 = {"max_position_embeddings": 131072, "rope_scaling": {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
LLAMA2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02}
LLAMA3_8B = LLAMA2_7B | LLAMA3 | {"intermediate_size": 14336}
# The values of the config.json that Meta published beside each.
PRESETS = {
    "llama2-7b": LLAMA2_7B,
    "llama3-8b": LLAMA3_8B,
    "llama3.1-8b": LLAMA3_8B | LLAMA31,
    "llama3.2-1b": LLAMA3_8B | LLAMA31 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True,
        "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0}},
    "llama3-70b": LLAMA3_8B | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
REFUSED = {"model_id": "--model names the model", "adapter_name_or_path": "the flags of LoRA say what is trained",
           "resume": "a step does not depend on what was trained before", "do_eval": "the training step alone is traced"}


@dataclass(frozen=True)
class State:
    """Bytes of one rank: parameters; gradients as long fp32 buckets, before they are reduced; fp32 master weights (bf16 under
    --stochastic_rounding) and AdamW's two moments."""

    parameters: int
    gradients: int
    master_weights: int
    moments: int


def read_model(name: str):
    """The LlamaConfig of a preset, of `tiny`, a directory or a config.json; raises ValueError for what is none."""
    from model.llama import LlamaConfig
    from trainer.config import SAMPLE
    if name in PRESETS:
        return LlamaConfig(**PRESETS[name])
    path = SAMPLE / "tiny" if name == "tiny" else Path(name)
    if not path.exists() or path.is_file() and path.name != "config.json":
        raise ValueError(f"--model {name}: {', '.join(PRESETS)}, tiny, a directory or a config.json was expected")
    return LlamaConfig.from_pretrained(path.parent if path.is_file() else path)


def build(config, model_config, mesh: Mesh):
    """The rank's model on the meta device, as the loop builds it; raises ValueError where it cannot be divided."""
    import torch

    from model.llama import Llama
    from model.lora import add_lora
    from parallel.pipeline import Pipeline
    from trainer.job import lora_config
    if config.max_seq_length > model_config.max_position_embeddings:
        raise ValueError(f"--max_seq_length {config.max_seq_length} is more than the model's positions "
                         f"(max_position_embeddings {model_config.max_position_embeddings})")
    model = Llama(model_config, mesh.tp, torch.bfloat16 if config.bf16 else torch.float32,
                  sequence_parallel=config.divides_sequence, pipeline=Pipeline(mesh.pp, mesh.model, config.microbatches))
    lora = lora_config(config)
    if lora:
        add_lora(model, lora)
    return model


def state_of(model, config, mesh: Mesh) -> State:
    """From the shapes of the parameters."""
    from parallel.buckets import Buckets
    from parallel.layers import named_shards
    parameters = list(named_shards(model))
    buckets = Buckets([each for each in parameters if each[1].requires_grad], mesh, config.zero_1)
    part = sum(columns for _, columns in buckets.shapes)
    return State(sum(parameter.numel() * parameter.element_size() for _, parameter, _ in parameters),
                 4 * part * buckets.parts, (2 if config.stochastic_rounding else 4) * part, 8 * part)


def collectives_of(graph: Graph, mesh: Mesh) -> dict[str, dict[str, int]]:
    """{"all-reduce over dp": {"count", "bytes"}, ...}; what is over none of the mesh's groups is over replicas of a slice."""
    kinds = (("world", mesh.world), ("tp x pp", mesh.model), ("pp", mesh.pp), ("dp", mesh.dp), ("tp", mesh.tp))
    names = {repr(group.replica_groups): name for name, group in kinds}
    count, size = Counter(), Counter()
    for each in graph.collectives:
        over = "pp" if each.opcode == "collective-permute" else names.get(repr(each.replica_groups), "replicas")
        what = f"{each.opcode} over {over}"
        count[what] += 1
        size[what] += each.bytes
    return {what: {"count": count[what], "bytes": size[what]} for what in sorted(count)}


def measure(config, model_config, mesh: Mesh, keep_proto: bool, compiles: bool) -> tuple[dict, list[bytes | None]]:
    """(the report, the graphs as HloModuleProtos where they are kept)."""
    from parallel.pipeline import Pipeline
    from tools.flops import micro_batch_flops
    from tools.roofline import kept_bytes, most_bytes
    from tools.tracing import trace
    model = build(config, model_config, mesh)
    micro = config.gradient_accumulation_steps
    often = {"step": 1}
    if config.graph_per_micro_batch:
        passes = {"forward": config.ticks, "backward": config.ticks} if config.ticks > 1 else {"micro_batch": 1}
        often = {name: micro * count for name, count in passes.items()} | {"update": 1}
    found = trace(config, model_config, mesh.world_size, keep_proto, compiles)
    if len(found) != len(often):
        raise RuntimeError(f"two steps have {len(found)} graphs, and {len(often)} were expected: something in the step of "
                           "trainer/loop.py that changes is a constant of its graph")
    graphs, counted = {}, 0
    for (name, runs), traced in zip(often.items(), found, strict=True):
        graph = Graph(traced.text)
        counted += runs * graph.dot_flops
        graphs[name] = {
            "runs_per_step": runs, "trace_seconds": traced.trace_seconds, "lowering_seconds": traced.lowering_seconds,
            "compile_seconds": traced.compile_seconds, "instructions": len(graph.instructions),
            "operations": dict(graph.operations.most_common()), "dot_flops": graph.dot_flops,
            "collectives": collectives_of(graph, mesh), "input_bytes": graph.input_bytes, "output_bytes": graph.output_bytes,
            "peak_bytes": graph.peak_bytes()}
    stages = Pipeline(mesh.pp).dealt(model_config.num_hidden_layers)
    held = [sum(number < model_config.num_hidden_layers for number in slots) for slots in stages]
    report = {"tensor_parallel_size": mesh.tp.size(), "pipeline_parallel_size": mesh.pp.size(),
              "data_parallel_size": mesh.dp.size(), "stage_layers": held, "slots": len(stages[0]),
              "num_microbatches": config.microbatches, "ticks": config.ticks, "graphs": graphs,
              "step_flops": counted, "formula_flops": micro * micro_batch_flops(model, config),
              "state_bytes": vars(state_of(model, config, mesh))}
    report |= {"kept_bytes": kept_bytes(report), "most_bytes": most_bytes(report)}
    return report, [traced.proto for traced in found]


def describe(report: dict) -> str:
    """The report as text."""
    said = []
    for name, graph in report["graphs"].items():
        runs = "once" if graph["runs_per_step"] == 1 else f"{graph['runs_per_step']} times"
        compiled = f", XLA:CPU compiles {graph['compile_seconds']:.2f} s" if graph["compile_seconds"] is not None else ""
        kinds = ", ".join(f"{count} {opcode}" for opcode, count in graph["operations"].items())
        said += [f"graph {name}, {runs} a step: {graph['instructions']} HLO instructions, traced "
                 f"in {graph['trace_seconds']:.2f} s, lowered in {graph['lowering_seconds']:.2f} s{compiled}", f"  {kinds}"]
        said += [f"  {what}: {each['count']} of {_size(each['bytes'])} in all" for what, each in graph["collectives"].items()]
        said += [f"  inputs {_size(graph['input_bytes'])}, outputs {_size(graph['output_bytes'])}, at most "
                 f"{_size(graph['peak_bytes'])} live beside the inputs (in the order of the text, nothing fused)"]
    formula, state, stages = report["formula_flops"], report["state_bytes"], report["stage_layers"]
    if len(stages) > 1:
        said.append(f"{len(stages)} stages of {report['slots']} layers ({sum(stages)} in all), {report['num_microbatches']} "
                    f"micro-batches in {report['ticks']} ticks: {(len(stages) - 1) / report['ticks']:.1%} of them idle")
    if report["kept_bytes"]:
        said.append(f"forward ticks keep {_size(report['kept_bytes'] // report['ticks'])} each for the backward, "
                    f"{_size(report['kept_bytes'])} in all")
    each = "of each stage " if len(stages) > 1 else ""
    said += [f"products of a step: {report['step_flops']:.6g} FLOPs a core in the graph, {formula:.6g} by the formula "
             f"({report['step_flops'] / formula - 1:+.3%})",
             f"a core {each}holds: " + ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in state.items())
             + f"; at most {_size(report['most_bytes'])} live at once"]
    return "\n".join(said)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def check_outputs(save_hlo: str | None, json_path: str | None) -> None:
    """Raise ValueError where something could not be written at the end; makes the directory of --save_hlo."""
    try:
        if save_hlo:
            os.makedirs(save_hlo, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--save_hlo {save_hlo} cannot be made: {error.strerror}") from None
    parent = Path(json_path).parent if json_path else Path()
    if json_path and (Path(json_path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK)):
        raise ValueError(f"--json {json_path} cannot be written: a file in a directory that exists was expected")


def main(arguments: list[str] | None = None) -> int:
    begun = time.perf_counter()
    # On the CPU where the Neuron SDK is installed, too; and the loop's progress bar has nothing to show.
    os.environ |= {"PJRT_DEVICE": "CPU", "TQDM_DISABLE": "1"}
    parser = argparse.ArgumentParser(prog="python -m tools.bench_compile", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, epilog="All other flags are those of trainer/main.py.")
    parser.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, tiny, a directory or a config.json")
    parser.add_argument("--compile", action="store_true", help="measure XLA:CPU's compilation too (small models)")
    parser.add_argument("--save_hlo", metavar="DIRECTORY", help="write each graph's HloModuleProto to DIRECTORY/<graph>.hlo.pb")
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE")
    chosen, rest = parser.parse_known_args(arguments)
    from tools.tracing import MANY, devices
    from trainer.config import parse
    config = parse(rest)
    if config.preset:                   # a preset says which model and checkpoint the job has; here --model names the model
        config = replace(config, model_id=None, resume=None)
    try:
        for flag, reason in REFUSED.items():
            if getattr(config, flag):
                raise ValueError(f"--{flag} is not taken here: {reason}")
        if not config.do_train:
            raise ValueError("--do_train false leaves no step to trace")
        mesh = Mesh.create(0, config.world_size or 1, config.tensor_parallel_size, config.pipeline_parallel_size)
        config = config.for_ranks(mesh.dp.size())
        if chosen.compile and mesh.world_size > MANY:
            raise ValueError(f"--compile is for small worlds, up to {MANY} ranks")
        prepare_environment(devices(mesh.world_size), config.stochastic_rounding)
        model_config = read_model(chosen.model)
        build(config, model_config, mesh)
        check_outputs(chosen.save_hlo, chosen.json)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report, protos = measure(config, model_config, mesh, bool(chosen.save_hlo), chosen.compile)
    if chosen.save_hlo:
        for name, proto in zip(report["graphs"], protos, strict=True):
            (Path(chosen.save_hlo) / f"{name}.hlo.pb").write_bytes(proto)
    report |= {"seconds": time.perf_counter() - begun, "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    stages = f" x PP{mesh.pp.size()}" if mesh.pp.size() > 1 else ""
    print(f"{chosen.model}, TP{mesh.tp.size()}{stages} x DP{mesh.dp.size()}, sequence {config.max_seq_length}, "
          f"{'bf16' if config.bf16 else 'fp32'}\n{describe(report)}\n"
          f"{report['seconds']:.1f} s and {_size(report['host_bytes'])} of this machine's memory in all")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"model": chosen.model, **report}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
