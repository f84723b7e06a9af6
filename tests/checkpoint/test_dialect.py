"""Checkpoints that are damaged are refused by name, those that only misdescribe themselves are read right, loudly."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ferrum_jax as fj
from ferrum_jax.checkpoint.dialect import _constant, largest_float
from ferrum_jax.checkpoint.load import CheckpointWarning
from ferrum_jax.errors import CheckpointError
from ferrum_kernels.bits import pack
from tests.support import damage
from tests.support import numpy_reader as reader
from tests.support.checkpoint_writer import (
    Edit,
    Tensors,
    TinySpec,
    make_quantization,
    pack_zeros,
    write_checkpoint,
)

IDS = np.random.default_rng(0).integers(2, 97, 12).astype(np.int32)
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.experts.3.up_proj"
SMALL = TinySpec(num_experts=4, num_layers=1)
WORDS_ONLY: dict[str, Any] = {
    "hidden_size": 8,
    "head_dim": 2,
    "num_kv_heads": 4,
    "moe_intermediate_size": 8,
    "group_size": -1,
}

forward = jax.jit(fj.forward, static_argnames="cfg")


def saying(spec: TinySpec, **settings: Any) -> TinySpec:
    """The same tensors under other quantisation settings; None drops a setting."""
    told = {key: value for key, value in (make_quantization(spec) | settings).items() if value is not None}
    return dataclasses.replace(
        spec, quantization_in=("config.json",), config_updates={"quantization_config": told, **spec.config_updates}
    )


def without_g_idx(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        del tensors[name]


def all_zero_g_idx(tensors: Tensors) -> None:
    tensors[f"{Q}.g_idx"] = np.zeros_like(tensors[f"{Q}.g_idx"])


def inexact_scales(tensors: Tensors) -> None:
    tensors[f"{Q}.scales"] = tensors[f"{Q}.scales"].astype(np.float32) * np.float32(1.0001)


def scales_beyond_float16(tensors: Tensors) -> None:
    tensors[f"{Q}.scales"] = np.full_like(tensors[f"{Q}.scales"], 1e6, np.float32)


def no_rows(tensors: Tensors) -> None:
    for part in ("scales", "qzeros"):
        tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][:0]


DAMAGED: dict[str, tuple[Edit, str]] = {
    "a norm is missing": (damage.drop("model.norm.weight"), "holds no tensor 'model.norm.weight'.*is incomplete"),
    "words are missing": (damage.drop(f"{Q}.qweight"), f"holds no tensor '{Q}.qweight'"),
    "an expert's scales are missing": (damage.drop(f"{UP}.scales"), f"holds no tensor '{UP}.scales'"),
    "zero points are missing": (damage.drop(f"{UP}.qzeros"), f"holds no tensor '{UP}.qzeros'"),
    "the head is missing": (damage.drop("lm_head.weight"), "holds no tensor 'lm_head.weight'"),
    "a tensor of another architecture": (
        damage.add("model.layers.0.mlp.shared_expert.gate_proj.weight", np.ones((4, 4), np.float32)),
        "1 tensors that a qwen3_moe does not have, such as model.layers.0.mlp.shared_expert.gate_proj.weight",
    ),
    "a bias that the model lacks": (damage.add(f"{Q}.bias", np.ones(64, np.float16)), f"does not have, .*{Q}.bias"),
    "one layer twice": (
        damage.add(f"{Q}.weight", np.ones((64, 64), np.float32)),
        f"holds both '{Q}.qweight' and '{Q}.weight': one linear layer, twice",
    ),
    "words as floats": (
        damage.cast(f"{Q}.qweight", np.float32),
        r"stores '.*q_proj.qweight' as F32\[8, 64\]; config.json and the format expect I32\[8, 64\]",
    ),
    "zero points in 64 bits": (damage.cast(f"{Q}.qzeros", np.int64), r"q_proj.qzeros' as I64\[2, 8\]; .*I32\[2, 8\]"),
    "scales in 64 bits": (damage.cast(f"{Q}.scales", np.float64), "as F64.*expect F32 or F16 or BF16"),
    "a norm of integers": (damage.cast("model.norm.weight", np.int32), r"'model.norm.weight' as I32\[64\]"),
    "g_idx of floats": (damage.cast(f"{Q}.g_idx", np.float32), r"q_proj.g_idx' as F32\[64\]; .*I32 or I64\[64\]"),
    "one row of words too few": (damage.cut(f"{Q}.qweight"), "7 rows of words.*no GPTQ layer of 2, 3, 4 or 8 bits"),
    "one column of words too few": (damage.cut(f"{Q}.qweight", axis=1), r"I32\[8, 63\]; .*I32\[8, 64\]"),
    "one scale too few": (damage.cut(f"{Q}.scales", axis=1), r"q_proj.scales' as F16\[2, 63\]; .*\[2, 64\]"),
    "one group of scales too few": (damage.cut(f"{Q}.scales"), r"q_proj.qzeros' as I32\[2, 8\]; .*I32\[1, 8\]"),
    "no scales at all": (no_rows, "q_proj.scales has 0 rows for 64 inputs; no group size gives that"),
    "an embedding too small": (
        damage.cut("model.embed_tokens.weight"),
        r"'model.embed_tokens.weight' as BF16\[96, 64\]; .*F32 or F16 or BF16\[97, 64\]",
    ),
    "a group too high": (
        damage.set_value(f"{Q}.g_idx", 5, 99),
        f"{Q}.g_idx is impossible: g_idx holds groups 0 to 99; K=64 with group_size=32 has 0 to 1",
    ),
    "a negative group": (damage.set_value(f"{Q}.g_idx", 5, -1), "g_idx holds groups -1 to 1"),
    "groups of other sizes": (
        damage.unbalance_groups(Q),
        r"g_idx is impossible: g_idx puts 33 inputs into group 0; every group must have group_size=32",
    ),
    "every input in group 0": (all_zero_g_idx, "g_idx puts 64 inputs into group 0"),
    "a scale is NaN": (damage.set_value(f"{UP}.scales", (0, 1), np.nan), f"'{UP}.scales' holds 1 values that are NaN"),
    "a scale is infinite": (damage.set_value(f"{Q}.scales", (1, 0), np.inf), f"'{Q}.scales' holds 1 values that are"),
    "an embedding is NaN": (
        damage.set_value("model.embed_tokens.weight", (3, 4), np.nan),
        "'model.embed_tokens.weight' holds 1 values that are NaN or infinite, so every text",
    ),
    "a router is infinite": (damage.set_value("model.layers.0.mlp.gate.weight", (0, 0), -np.inf), "mlp.gate.weight"),
    "a norm is NaN": (damage.set_value("model.norm.weight", 0, np.nan), "'model.norm.weight' holds 1 values"),
    "two kinds of zero points": (
        damage.shift_zeros(bits=4, modules=1),
        r"contradict each other: those of .* are stored minus one \(gptq\), those of .*experts.0.down_proj as they are "
        r"\(gptq_v2\). Say which with checkpoint_format=",
    ),
    "scales finer than float16": (inexact_scales, f"'{Q}.scales' is stored as float32 with values that float16 cannot"),
    "scales beyond float16": (scales_beyond_float16, f"'{Q}.scales' is stored as float32 with values that float16"),
}


@pytest.mark.parametrize(("edit", "text"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named_before_the_device_is_touched(
    edit: Edit, text: str, tmp_path: Path, untouched_device: None
) -> None:
    folder = write_checkpoint(tmp_path, SMALL, edits=[edit])
    with pytest.raises(CheckpointError, match=text):
        fj.load(folder, dtype="float32", quiet=True)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_number_in_place_of_a_tensor_is_refused(part: str, tmp_path: Path, untouched_device: None) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    tensors = dict(reader.read_checkpoint(folder).tensors)
    tensors[f"{Q}.{part}"] = np.array(3, tensors[f"{Q}.{part}"].dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q}\.(qweight has|{part}' as|scales has)"):
        fj.load(folder, dtype="float32", quiet=True)


@pytest.mark.parametrize(
    ("spec", "edits", "text"),
    [
        (dataclasses.replace(SMALL, config_updates={"hidden_size": 128}), [], r"embed_tokens.*\[97, 64\].*\[97, 128\]"),
        (dataclasses.replace(SMALL, config_updates={"num_hidden_layers": 2}), [], "holds no tensor 'model.layers.1."),
        (dataclasses.replace(SMALL, config_updates={"num_local_experts": 3}), [], r"mlp.gate.*\[4, 64\].*\[3, 64\]"),
        (dataclasses.replace(SMALL, config_updates={"attention_bias": True}), [], "holds no tensor '.*proj.bias'"),
        (dataclasses.replace(SMALL, config_updates={"tie_word_embeddings": True}, lm_head="quantized"), [],
         "4 tensors that a qwen3_moe does not have, such as lm_head.g_idx"),
        (saying(dataclasses.replace(SMALL, **WORDS_ONLY), bits=8), [], r"bits could be any of \[2, 3, 4\]. Say which"),
        (saying(dataclasses.replace(SMALL, hidden_size=96, group_size=64), group_size=16), [without_g_idx],
         r"2 rows for 96 inputs; group_size could be any of \[48, 64\]. Say which in quantize_config.json"),
    ],
    ids=["width", "depth", "experts", "biases", "tied, quantised head", "ambiguous bits", "ambiguous groups"],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(
    spec: TinySpec, edits: list[Edit], text: str, tmp_path: Path, untouched_device: None
) -> None:
    with pytest.raises(CheckpointError, match=text):
        fj.load(write_checkpoint(tmp_path, spec, edits=edits), dtype="float32", quiet=True)


def assert_warned_and_right(folder: Path, text: str, judge: reader.Checkpoint, **arguments: Any) -> fj.Model:
    with pytest.warns(CheckpointWarning, match=text) as caught:
        model = fj.load(folder, dtype="float32", quiet=True, **arguments)
    assert len(caught) == 1 and model.report.warnings == (str(caught[0].message),)
    assert_right(model, judge)
    return model


def assert_right(model: fj.Model, judge: reader.Checkpoint) -> None:
    logits = forward(model.params, IDS[None], cfg=model.cfg)[0]
    np.testing.assert_allclose(logits, reader.forward(judge, IDS).logits, rtol=0, atol=1e-4)


ASYM = dataclasses.replace(SMALL, sym=False)
MISLEADING = {
    "other bits": (saying(SMALL, bits=8), "packed with 4 bits, the metadata says 8: .* and 15 more modules"),
    "other groups": (saying(SMALL, group_size=16), "packed in groups of 32, the metadata says 16"),
    "one group": (saying(SMALL, group_size=-1), "packed in groups of 32, the metadata says -1"),
    "sym": (saying(ASYM, sym=True), "zero points are not symmetric although the metadata says sym=true"),
    "desc_act": (saying(dataclasses.replace(SMALL, desc_act=True), desc_act=False), "g_idx permutes the inputs, the"),
    "no format": (saying(ASYM, checkpoint_format=None, format=None), r"vary; read as gptq \(v1\)"),
    "dynamic": (
        saying(dataclasses.replace(SMALL, dynamic={r"-:.*up_proj": {}}), dynamic=None),
        "says quantised, the files hold plain weights: model.layers.0.mlp.experts.0.up_proj and 3 more modules. The",
    ),
    "nothing": (dataclasses.replace(SMALL, quantization_in=()), "packed although the metadata does not say so"),
}


@pytest.mark.parametrize(("spec", "text"), MISLEADING.values(), ids=MISLEADING)
def test_metadata_that_disagrees_is_a_warning_and_the_data_decides(spec: TinySpec, text: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, spec)
    assert_warned_and_right(folder, text, reader.read_checkpoint(folder))


def test_group_sizes_come_from_a_permuted_g_idx_where_the_metadata_is_wrong(tmp_path: Path) -> None:
    spec = saying(dataclasses.replace(ASYM, desc_act=True, hidden_size=96, group_size=64), group_size=16)
    folder = write_checkpoint(tmp_path, spec)
    with pytest.warns(CheckpointWarning, match=r"packed in groups of (64|32), the metadata says 16") as caught:
        model = fj.load(folder, dtype="float32", quiet=True)
    assert len(caught) == 2  # 96 inputs of attention, gate and up in groups of 64; 32 inputs of down in one group
    assert_right(model, reader.read_checkpoint(folder))
    assert fj.layer(model.params, 0)["attn"]["qkv"].group_size == 64


@pytest.mark.parametrize(("told", "real"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_symmetric_zero_points_overrule_a_wrong_format(told: str, real: str, tmp_path: Path) -> None:
    number = {"gptq": 1, "gptq_v2": 2}[real]
    spec = dataclasses.replace(SMALL, checkpoint_format=told, zeros_version=number)  # type: ignore[arg-type]
    folder = write_checkpoint(tmp_path, spec)
    judge = reader.read_checkpoint(folder)
    judge.quantization["checkpoint_format"] = real
    text = f"zero points are stored as {real}, the metadata says {told}"
    assert assert_warned_and_right(folder, text, judge).report.version == real


def test_checkpoint_format_settles_what_asymmetric_zero_points_leave_open(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dataclasses.replace(ASYM, zeros_version=2))
    judge = reader.read_checkpoint(folder)
    judge.quantization["checkpoint_format"] = "gptq_v2"
    model = fj.load(folder, dtype="float32", quiet=True, checkpoint_format="gptq_v2")
    assert model.report.version == "gptq_v2"
    assert_right(model, judge)


def test_checkpoint_format_settles_zero_points_that_leave_doubt(tmp_path: Path) -> None:
    """Nines everywhere in one module, which stored minus one look like the eights of the other format."""
    module = "model.layers.0.mlp.experts.0.down_proj"

    def nines(tensors: Tensors) -> None:
        shape = tensors[f"{module}.scales"].shape
        tensors[f"{module}.qzeros"] = pack_zeros(np.full(shape, 9), 4, version=1)

    folder = write_checkpoint(tmp_path, ASYM, edits=[nines])
    text = f"zero points of {module} look like gptq_v2, the metadata says gptq, and those of {Q} fit both. Say which"
    with pytest.raises(CheckpointError, match=text):
        fj.load(folder, quiet=True)
    model = fj.load(folder, dtype="float32", quiet=True, checkpoint_format="gptq")
    assert_right(model, reader.read_checkpoint(folder))


def test_a_warning_names_the_first_module_and_counts_the_others(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, MISLEADING["other groups"][0])
    with pytest.warns(CheckpointWarning) as caught:
        fj.load(folder, quiet=True)
    names = re.search(r": (\S+) and (\d+) more modules", str(caught[0].message))
    assert names is not None and names[1] == Q and int(names[2]) == 4 + 3 * 4 - 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_largest_magnitude_is_found_without_arithmetic(dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal((50, 7)).astype(dtype)
    assert largest_float(values) == float(np.abs(values).max())
    assert largest_float(-np.abs(values[3:4])) == float(np.abs(values[3]).max())
    assert largest_float(values[:0]) == 0
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        values[20, 3] = bad
        assert not np.isfinite(largest_float(values))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [32, 37])  # words with and without padding
def test_constant_zero_points_tell_their_version(bits: int, n: int) -> None:
    for code in range(2**bits):
        zeros = pack(np.full((3, n), code), bits, axis=-1)
        version = {2 ** (bits - 1): "gptq_v2", 2 ** (bits - 1) - 1: "gptq"}.get(code)
        assert _constant(zeros, bits, n) == version
        codes = np.full((3, n), code)
        codes[2, n - 1] ^= 1
        assert _constant(pack(codes, bits, axis=-1), bits, n) is None
