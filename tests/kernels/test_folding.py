"""Columns of a tiled weight in another order, and experts whose down projection needs no permutation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_kernels import ShapeError, dequantize, tile
from ferrum_kernels.folding import folds, reorder_columns, reorder_gate_and_up
from tests.support.gptq_cases import make_linear, make_stack


@pytest.mark.once
@settings(max_examples=6)
@given(st.sampled_from([27, 64, 96]), st.sampled_from([4, 8]), st.booleans(), st.booleans(), st.booleans())
def test_columns_go_where_they_are_asked_to(n, bits, sym, act_order, bias):
    w, dense = make_stack(0, 3, k=64, n=n, bits=bits, group_size=32, sym=sym, act_order=act_order)
    order = np.random.default_rng(n).permuted(np.tile(np.arange(n, dtype=np.int32), (3, 1)), axis=1)
    tiled = tile(w)
    if bias:
        tiled = dataclasses.replace(tiled, bias=jnp.arange(3 * n, dtype=jnp.float16).reshape(3, n))
    found = reorder_columns(tiled, jnp.asarray(order))
    np.testing.assert_allclose(dequantize(found), np.take_along_axis(dense, order[:, None, :], axis=2), rtol=1e-6)
    if bias:
        np.testing.assert_array_equal(found.bias, np.take_along_axis(np.asarray(tiled.bias), order, axis=1))
    back = reorder_columns(found, jnp.asarray(np.argsort(order, axis=1)))
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tiled), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_order_of_another_shape_is_refused():
    w, _ = make_linear(0, k=64, n=32, group_size=32)
    message = r"order is \[2, 32\]; a TiledLinear with leading axes \[\] and 32 outputs needs \[32\]\."
    with pytest.raises(ShapeError, match=message):
        reorder_columns(tile(w), jnp.zeros((2, 32), jnp.int32))


@pytest.mark.once
@pytest.mark.parametrize("apart", [False, True])
def test_folded_experts_compute_the_same(apart):
    gate, dense_gate = make_stack(1, 2, k=64, n=48, group_size=32, act_order=True)
    up, dense_up = make_stack(2, 2, k=64, n=48, group_size=32, act_order=True)
    down, dense_down = make_stack(3, 2, k=48, n=32, group_size=16, act_order=True)
    down = dataclasses.replace(down, group_size=48, scales=down.scales[:, :1], qzeros=None)  # one group has tiles
    dense_down = np.asarray(dequantize(down))
    if apart:
        experts = {"gate": tile(gate), "up": tile(up)}
    else:
        both = {name: jnp.concatenate([getattr(w, name) for w in (gate, up)], -1) for name in ("qweight", "scales")}
        both |= {"qzeros": jnp.concatenate([gate.qzeros, up.qzeros], -1), "perm": gate.perm, "shape": (64, 96)}
        experts = {"gate_up": tile(dataclasses.replace(gate, **both))}
        dense_up = np.asarray(dequantize(dataclasses.replace(up, perm=gate.perm)))
    tiled = tile(down)
    assert folds({**experts, "down": tiled})
    folded = reorder_gate_and_up(experts, tiled.perm)
    plain = dataclasses.replace(tiled, perm=None)
    assert not folds({**folded, "down": plain})
    assert not folds({**experts, "down": down})
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for e in range(2):
        gated = x @ np.concatenate([np.asarray(dequantize(w))[e] for w in folded.values()], axis=1)
        h = gated[:, :48] / (1 + np.exp(-gated[:, :48])) * gated[:, 48:]
        g, u = x @ dense_gate[e], x @ dense_up[e]
        expected = (g / (1 + np.exp(-g)) * u) @ dense_down[e]
        np.testing.assert_allclose(h @ np.asarray(dequantize(plain))[e], expected, rtol=2e-4, atol=1e-5)
