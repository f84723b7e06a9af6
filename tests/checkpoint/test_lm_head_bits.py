"""An output projection held in fewer bits than the checkpoint has: rounded at load, tied or not, or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.checkpoint import load as loading
from ferrum_jax.checkpoint.files import TensorReader
from ferrum_jax.checkpoint.weight_cache import find_entry
from ferrum_jax.errors import CheckpointError, ConfigError
from ferrum_jax.kernels import PackedLinear, round_to_nearest
from ferrum_jax.params import num_bytes
from tests.support import damage
from tests.support.checkpoint_writer import TinySpec, make_tensors, write_checkpoint
from tests.support.close import assert_close

UNTIED = TinySpec(num_experts=4, num_layers=1)
TIED = dataclasses.replace(UNTIED, lm_head="tied", hidden_size=160, dtype="float16")  # a short last group
QUANTISED = dataclasses.replace(UNTIED, lm_head="quantized")
TOKENS = jnp.array([[5, 6, 7]])


def stored(spec: TinySpec) -> np.ndarray:
    """The projection [V, D] as the checkpoint has it."""
    return make_tensors(spec)["model.embed_tokens.weight" if spec.lm_head == "tied" else "lm_head.weight"]


def load(folder: Path, **arguments: Any) -> fj.Model:
    return fj.load(folder, quiet=True, **arguments)


@pytest.mark.parametrize("spec", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_projection_is_rounded_and_nothing_else_changes(
    spec: TinySpec, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, spec)
    blocks = TensorReader.blocks
    monkeypatch.setattr(
        TensorReader, "blocks", lambda reader, name, **rows: blocks(reader, name, 2**12, **rows)
    )  # more than one
    plain, model = (load(folder, lm_head_bits=n, dtype="float32") for n in (None, bits))
    assert model.cfg == dataclasses.replace(plain.cfg, lm_head_bits=bits)
    head = model.params["lm_head"]
    assert isinstance(head, PackedLinear)
    assert (head.bits, head.group_size) == (bits, min(128, spec.hidden_size))
    expected = round_to_nearest(stored(spec).T, bits, 128)
    np.testing.assert_array_equal(head.qweight, expected.qweight)
    np.testing.assert_array_equal(head.scales, expected.scales)
    others = [{key: leaf for key, leaf in one.params.items() if key != "lm_head"} for one in (plain, model)]
    chex.assert_trees_all_equal(*others)
    chex.assert_trees_all_equal_shapes_and_dtypes(fj.abstract(model.cfg), model.params)
    assert model.report.bytes_held == num_bytes(model.params)
    logits, aux = fj.forward(model.params, TOKENS, model.cfg, with_aux=True)
    weight = np.asarray(fj.dequantize(expected), np.float64)
    assert_close(logits, np.asarray(aux.hidden[-1], np.float64) @ weight)
    known = np.asarray(fj.forward(plain.params, TOKENS, plain.cfg))
    assert 0 < np.abs(logits - known).max() < {8: 0.05, 4: 1.0}[bits]


def test_a_device_with_memory_of_its_own_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, TIED)
    shared = load(folder, lm_head_bits=8)
    monkeypatch.setattr(loading, "shares_memory", lambda: False)
    chex.assert_trees_all_equal(load(folder, lm_head_bits=8).params, shared.params)


def test_a_model_without_quantisation_takes_it(tmp_path: Path) -> None:
    def plain(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            module, n = name.removesuffix(".qweight"), tensors[name].shape[1]
            k = len(tensors.pop(f"{module}.g_idx"))
            for part in ("qweight", "qzeros", "scales"):
                del tensors[f"{module}.{part}"]
            tensors[f"{module}.weight"] = np.zeros((n, k), np.float16)

    folder = write_checkpoint(tmp_path, dataclasses.replace(UNTIED, quantization_in=()), edits=[plain])
    model = load(folder, lm_head_bits=4)
    assert (model.cfg.quant, model.report.version) == (None, None)
    packed = [leaf for leaf in jax.tree.leaves(model.params) if leaf.dtype == jnp.uint32]
    assert len(packed) == 1 and fj.forward(model.params, TOKENS, model.cfg).shape == (1, 3, 97)


@pytest.mark.parametrize("bits", [0, 2, 16, True, 8.0, "8"])
def test_other_widths_are_refused_before_anything_is_looked_for(bits: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^lm_head_bits is {bits!r}; 4 or 8 is accepted, and None, .*; pick one"):
        load(Path("nowhere"), lm_head_bits=bits)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "not declared"])
def test_a_projection_that_is_quantised_already_is_refused(
    declared: bool, tmp_path: Path, untouched_device: None
) -> None:
    hidden = {} if declared else {"quantization_in": ()}
    folder = write_checkpoint(tmp_path, dataclasses.replace(QUANTISED, **hidden))
    text = r"'lm_head.qweight' is quantised already, so lm_head_bits=8 has nothing to round\. Leave lm_head_bits out\."
    with pytest.raises(CheckpointError, match=text):
        load(folder, lm_head_bits=8)


def test_values_that_no_scale_holds_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, UNTIED, edits=[damage.set_value("lm_head.weight", (3, 4), 1e6)])
    text = r"lm_head.weight: the weight holds values that are NaN, infinite or beyond 7 x 65504, .* 4 bits"
    with pytest.raises(CheckpointError, match=text):
        load(folder, lm_head_bits=4)
    assert load(folder, lm_head_bits=8).params["lm_head"].scales.max() > 7000


def test_a_projection_with_broken_values_is_refused(tmp_path: Path, untouched_device: None) -> None:
    folder = write_checkpoint(tmp_path, UNTIED, edits=[damage.set_value("lm_head.weight", (3, 4), np.nan)])
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' holds 1 values that are NaN or infinite"):
        load(folder, lm_head_bits=8)


def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, UNTIED, edits=[damage.drop("lm_head.weight")])
    with pytest.raises(CheckpointError, match=r"holds no tensor 'lm_head.weight'"):
        load(folder, lm_head_bits=8)


def test_the_cache_of_assembled_weights_keeps_each_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRUM_JAX_WEIGHT_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "tiny", TIED)
    widths = (None, 8, 4)
    cold = {bits: load(folder, lm_head_bits=bits, weight_cache=True) for bits in widths}
    warm = {bits: load(folder, lm_head_bits=bits, weight_cache=True) for bits in widths}
    assert len(list((tmp_path / "cache").iterdir())) == 3
    for bits in widths:
        assert (cold[bits].report.from_cache, warm[bits].report.from_cache) == (False, True)
        chex.assert_trees_all_equal(warm[bits].params, cold[bits].params)
    entries = [find_entry(tmp_path, folder, warm[bits].cfg, None) for bits in widths]
    assert len({entry.key for entry in entries}) == len({entry.path for entry in entries}) == 3
