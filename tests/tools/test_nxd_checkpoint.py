"""neuronx-distributed's checkpoints, cut here by its own rules, are to the bit the transformers model that
they were cut from."""

import argparse
import math

import pytest
import torch
from torch_xla.utils import serialization as xser

from model.config import ModelConfig
from tests.support.models import save_llama
from tools.merge_checkpoint import nxd, nxd_files
from tools.merge_checkpoint.nxd import NxdCheckpoint

KINDS = {
    "grouped": {},
    "two_kv_heads": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "multi_head": {"num_key_value_heads": 8},
    "tied": {"tied": True},
    "wide_heads": {"head_dim": 16},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (config, the transformers model's state dict), each made once."""
    known = {}

    def make(kind):
        if kind not in known:
            directory = tmp_path_factory.mktemp(kind)
            state = save_llama(directory, **KINDS[kind]).state_dict()
            known[kind] = ModelConfig.from_pretrained(directory), state
        return known[kind]

    return make


def local_weight(whole, dim, rank, tp, stride=1):
    """ColumnParallelLinear's and RowParallelLinear's part: every tp-th of the slices, `stride` of them."""
    return torch.cat(whole.split(whole.shape[dim] // tp // stride, dim)[rank::tp], dim)


def heads_of(rank, config, tp, trainium):
    """(the query heads, the KV heads) of a rank of GQAQKVColumnParallelLinear, by their numbers in the whole
    model."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    if tp <= keys:
        return [[*range(rank * heads // tp, (rank + 1) * heads // tp)] for heads in (queries, keys)]
    times = tp // keys
    repeated = (
        [*range(keys)] * times if trainium == 1 else [head for head in range(keys) for _ in range(times)]
    )
    attending = {head: [*range(head * queries // keys, (head + 1) * queries // keys)] for head in range(keys)}
    each = queries // tp
    taken = repeated[:rank].count(repeated[rank]) * each  # its replicas on lower ranks have these
    return attending[repeated[rank]][taken : taken + each], [repeated[rank]]


def rank_state(state, config, rank, tp, qkv, trainium):
    """The names and tensors that a tensor parallel rank of neuronx-distributed's Llama holds."""
    held = {}

    def rows(whole, heads):
        return torch.cat([whole.view(-1, config.head_dim, whole.shape[1])[head] for head in heads])

    for name, whole in state.items():
        stem, _, module = name.removesuffix(".weight").rpartition(".")
        if module in ("q_proj", "k_proj", "v_proj", "o_proj") and qkv in ("linear", "fused"):
            queries, keys = heads_of(rank, config, tp, trainium)
            if module == "o_proj":
                # The converter leaves it transposed in memory.
                held[name] = rows(whole.t().contiguous(), queries).t()
            else:
                held[f"{stem}.qkv_proj.weight_{module[0]}"] = rows(
                    whole, queries if module == "q_proj" else keys
                )
        elif module in ("o_proj", "down_proj"):
            held[name] = local_weight(whole, 1, rank, tp)
        elif module == "gate_proj" and qkv != "separate":
            both = torch.cat([whole, state[f"{stem}.up_proj.weight"]])
            held[f"{stem}.gate_up_proj.weight"] = local_weight(both, 0, rank, tp, stride=2)
        elif module == "q_proj" and qkv == "stride":
            three = torch.cat([state[f"{stem}.{letter}_proj.weight"] for letter in "qkv"])
            held[f"{stem}.qkv_proj.weight"] = local_weight(three, 0, rank, tp, stride=3)
        elif whole.dim() == 1:
            held[name] = whole.clone()
        elif qkv == "separate" or module in ("embed_tokens", "lm_head"):
            held[name] = local_weight(whole.t(), 1, rank, tp).t()  # transposed in memory, which is no matter
    if qkv == "fused":
        for name in [name for name in held if name.endswith("weight_q")]:
            held[name.replace("weight_q", "weight_qkv")] = torch.cat(
                [held.pop(name[:-1] + letter) for letter in "qkv"]
            )
    return held


def save_xser(state, path):
    """What save_checkpoint(use_xser=True) and xser.save write of a nested dictionary of tensors."""
    folder, info = path.with_name(path.name + ".tensors"), {}
    folder.mkdir()

    def referred(value):
        if isinstance(value, dict):
            return {key: referred(each) for key, each in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        number = len(info)
        info[number] = {"dtype": value.dtype, "shape": value.shape, "expert_model_parallel": False}
        torch.save(value, xser._get_tensor_file(folder, number))
        return xser.TensorReference(number)

    torch.save(referred(state), path)
    torch.save(info, f"{path}.info.pt")


def save_nxd(tag, config, state, tp, pp=1, qkv="linear", trainium=1, use_xser=False, old=None):
    """A checkpoint by nxd.save_checkpoint; or in the older layout, the model's part under the name `old`."""
    folder = tag if old else tag / "model"
    folder.mkdir(parents=True)
    for marker in () if old else ("checkpoint", "done"):
        (tag / marker).write_text("1")
    for stage in range(pp):

        def belongs(name, stage=stage):
            if ".layers." in name:
                return int(name.split(".")[2]) * pp // config.num_hidden_layers == stage
            return stage == (0 if "embed_tokens" in name else pp - 1)

        part = {name: tensor for name, tensor in state.items() if belongs(name)}
        for rank in range(tp):
            held, name = (
                rank_state(part, config, rank, tp, qkv, trainium),
                f"tp_rank_{rank:02d}_pp_rank_{stage:02d}",
            )
            if old and not use_xser:
                (folder / name).mkdir()
            path = folder / (
                f"dp_rank_00_{name}.pt" if not old else name if use_xser else f"{name}/checkpoint.pt"
            )
            save = save_xser if use_xser else torch.save
            save(
                {old: held, "global_step": 3, "optimizer": {"exp_avg": torch.ones(2)}} if old else held, path
            )
    return tag


def check(directory, config, state):
    """The checkpoint is the model of that state dict, in its names, shapes, dtypes and bits."""
    assert NxdCheckpoint.is_one(directory)
    checkpoint = NxdCheckpoint(directory, config)
    expected = {
        name: tensor
        for name, tensor in state.items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        bands = list(checkpoint.stream(name))
        assert checkpoint.dtype(name) == tensor.dtype == bands[0].dtype
        assert all(band.is_contiguous() for band in bands)
        assert torch.equal(torch.cat(bands).view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    "kind, layout",
    [
        ("grouped", {"tp": 1}),
        ("grouped", {"tp": 2, "qkv": "separate", "pp": 2}),
        ("grouped", {"tp": 4, "qkv": "fused", "use_xser": True}),
        ("grouped", {"tp": 8}),
        ("grouped", {"tp": 8, "qkv": "fused", "pp": 2, "use_xser": True}),
        ("grouped", {"tp": 8, "trainium": 2}),
        ("two_kv_heads", {"tp": 8, "pp": 3}),
        ("two_kv_heads", {"tp": 8, "trainium": 2, "qkv": "fused"}),
        ("two_kv_heads", {"tp": 4, "use_xser": True}),
        ("one_kv_head", {"tp": 4}),
        ("multi_head", {"tp": 4, "qkv": "stride"}),
        ("multi_head", {"tp": 8, "qkv": "fused"}),
        ("wide_heads", {"tp": 8, "qkv": "fused"}),
        ("tied", {"tp": 2, "pp": 2}),
        ("grouped", {"tp": 2, "old": "model"}),
        ("grouped", {"tp": 8, "old": "state_dict", "use_xser": True, "pp": 2}),
    ],
    ids=str,
)
def test_streams_are_the_model(tmp_path, made, kind, layout):
    config, state = made(kind)
    check(save_nxd(tmp_path / "step_10", config, state, **layout), config, state)


def test_dtypes_are_the_files(tmp_path, made):
    config, state = made("grouped")
    state = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}
    tag = save_nxd(tmp_path / "tag", config, state, tp=8)
    check(tag, config, state)
    check(tag / "model", config, state)


def test_bands_are_small(tmp_path, made, monkeypatch):
    monkeypatch.setattr(nxd, "BAND_BYTES", 1000)  # three rows of [.., 64] fp32, two of [.., 96]
    monkeypatch.setattr(nxd_files, "MAPPED_BYTES", 2000)
    check(tag := save_nxd(tmp_path / "tag", *made("two_kv_heads"), tp=4), *made("two_kv_heads"))
    checkpoint = NxdCheckpoint(tag, made("two_kv_heads")[0])
    for name, shape in checkpoint.shapes.items():
        bands = list(checkpoint.stream(name))
        assert all(band.nbytes <= 1000 for band in bands)
        assert len(shape) == 1 or len(bands) >= math.prod(shape) * 4 // 1000


def test_buffers_and_a_tied_head_may_be_left_out_or_carried(tmp_path, made):
    config, state = made("tied")
    without = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    check(save_nxd(tmp_path / "without", config, without, tp=2), config, state)
    tag = save_nxd(
        tmp_path / "old",
        config,
        state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        tp=2,
    )
    check(tag, config, state)


def test_what_is_none(tmp_path, made):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("")
    assert not NxdCheckpoint.is_one(tmp_path)
    assert not NxdCheckpoint.is_one(tmp_path / "nowhere")
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no file dp_rank_00_tp_rank"):
            NxdCheckpoint(directory, made("grouped")[0])


def changed(rank, change):
    """Damage that loads the file of a tensor parallel rank, changes what it holds, and writes it back."""

    def damage(model):
        path = model / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt"
        held = torch.load(path)
        change(held)
        torch.save(held, path)

    return damage


def truncated(model):
    path = model / "dp_rank_00_tp_rank_03_pp_rank_00.pt"
    path.write_bytes(path.read_bytes()[:-5000])


ALL = range(8)
NORM = "model.layers.1.input_layernorm.weight"
FIRST_KEY, KEY = (f"model.layers.{layer}.self_attn.qkv_proj.weight_k" for layer in (0, 1))


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            [lambda model: (model / "dp_rank_00_tp_rank_03_pp_rank_00.pt").unlink()],
            "dp_rank_00_tp_rank_03_pp_rank_00.pt is missing",
        ),
        (
            [lambda model: (model / "dp_rank_00_tp_rank_07_pp_rank_00.pt").unlink()],
            "tp_rank_00.*is a rank's file missing",
        ),
        ([truncated], "tp_rank_03.*cannot be read"),
        ([lambda model: (model / "dp_rank_00_tp_rank_03_pp_rank_00.pt").write_text("")], "tp_rank_03"),
        (
            [lambda model: (model / "dp_rank_00_tp_rank_03_pp_rank_01.pt").write_text("")],
            "tp_rank_00_pp_rank_01.pt is missing",
        ),
        (
            [lambda model: (model / "tp_rank_02_pp_rank_00").write_text("")],
            "are both of tensor parallel rank 2",
        ),
        (
            [lambda model: (model / "dp_rank_00_ep_rank_00_tp_rank_00_pp_rank_00.pt").write_text("")],
            "expert parallel",
        ),
        ([lambda model: (model.parent / "done").unlink()], "is incomplete"),
        (
            [changed(2, lambda held: held[NORM][-1:].add_(1))],
            "tp_rank_02.*norm.weight differs from its replica in .*tp_rank_00",
        ),
        (
            [changed(5, lambda held: held[KEY][-1:].add_(1))],
            "tp_rank_05.*weight_k differs from its replica in .*tp_rank_01",
        ),
        ([changed(5, lambda held: held[FIRST_KEY][-1:].add_(1))], "the replicas of KV heads differ"),
        ([changed(rank, lambda held: held[FIRST_KEY].zero_()) for rank in ALL], "all KV heads are the same"),
        (
            [changed(1, lambda held: held.update(more=torch.ones(1)))],
            r"tp_rank_01.*more is \(\(1,\), torch.float32\); .* missing",
        ),
        ([changed(1, lambda held: held.pop(NORM))], f"tp_rank_01.*{NORM} is missing"),
        ([changed(1, lambda held: held.update({NORM: held[NORM][:-1]}))], r"tp_rank_01.*\(63,\)"),
        ([changed(1, lambda held: held.update({NORM: held[NORM].half()}))], "tp_rank_01.*float16"),
        (
            [changed(rank, lambda held: held.update(more=torch.ones(1))) for rank in ALL],
            "more is no weight of the config's Llama",
        ),
        ([changed(rank, lambda held: held.pop(NORM)) for rank in ALL], f"missing, first {NORM}"),
        (
            [changed(rank, lambda held: held.update({NORM: held[NORM][:-1]})) for rank in ALL],
            r"\[63\] on each of 8",
        ),
        (
            [changed(rank, lambda held: held.update({KEY: held[KEY].repeat(2, 1)})) for rank in ALL],
            r"weight_k is \[16, 64\]",
        ),
        (
            [
                changed(
                    rank,
                    lambda held: held.update({KEY.replace("qkv_proj.weight_k", "k_proj.weight"): held[KEY]}),
                )
                for rank in ALL
            ],
            "holds model.layers.1.self_attn.k_proj.weight, and so does",
        ),
        (
            [changed(0, lambda held: held.update({NORM: held[NORM].long()}))],
            "no tensor of floating point numbers",
        ),
        (
            [
                changed(
                    0,
                    lambda held: held.update(
                        {"model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(1)}
                    ),
                )
            ],
            "LoRA",
        ),
        ([changed(0, lambda held: held.update(lora_config={"r": 8}))], "LoRA"),
        ([changed(0, lambda held: held.update(args=argparse.Namespace()))], "it holds argparse.Namespace"),
        ([lambda model: torch.save([], model / "dp_rank_00_tp_rank_00_pp_rank_00.pt")], "but a list"),
    ],
)
def test_what_is_damaged_or_unknown_is_named(tmp_path, made, damage, message):
    config, state = made("grouped")
    model = save_nxd(tmp_path / "tag", config, state, tp=8) / "model"
    for each in damage:
        each(model)
    refused(tmp_path / "tag", config, message)


def refused(tag, config, message):
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint = NxdCheckpoint(tag, config)
        for name in checkpoint.shapes:
            for _ in checkpoint.stream(name):
                pass
    assert "\n" not in str(raised.value) and str(tag) in str(raised.value)


def test_a_lost_tensor_of_xser_is_named(tmp_path, made):
    tag = save_nxd(tmp_path / "tag", *made("grouped"), tp=2, use_xser=True)
    lost = tag / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt.tensors" / "tensor_4.pt"
    lost.write_bytes(lost.read_bytes()[:-200])
    refused(tag, made("grouped")[0], "tensor_4.pt cannot be read")
    lost.unlink()
    refused(tag, made("grouped")[0], "tensor_4.pt cannot be read: .*No such file")


def test_nothing_but_numbers_and_tensors_is_loaded(tmp_path, made):
    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").touch.__func__, (tmp_path / "ran",)

    tag = save_nxd(tmp_path / "tag", *made("grouped"), tp=1)
    for content, message in (
        (xser.TensorReference("../elsewhere"), "the reference to the tensor norm has no number"),
        (Code(), "cannot be read: it holds"),
    ):
        torch.save({"norm": content}, tag / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt")
        refused(tag, made("grouped")[0], message)
    assert not (tmp_path / "ran").exists()


def test_another_models_config_is_refused(tmp_path, made):
    tag = save_nxd(tmp_path / "tag", *made("grouped"), tp=2)
    refused(tag, made("two_kv_heads")[0], r"weight_k is \[16, 64\] on each of 2.*whole is \[16, 64\]")


def test_a_head_that_is_not_tied_is_refused(tmp_path, made):
    config, state = made("tied")
    tag = save_nxd(tmp_path / "tag", config, state | {"lm_head.weight": state["lm_head.weight"] + 1}, tp=2)
    refused(tag, config, "lm_head.weight differs from model.embed_tokens.weight")


def test_biases_are_refused(tmp_path, made):
    biased = ModelConfig(**{**vars(made("grouped")[0]), "attention_bias": True})
    refused(tmp_path, biased, "biases")
