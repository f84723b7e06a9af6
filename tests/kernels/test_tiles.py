"""TiledLinear: the same numbers in another order, and back, bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_kernels import ShapeError, dequantize, gptq_matmul, is_weight, tile, untile
from ferrum_kernels.errors import BackendError
from tests.support.gptq_cases import make_linear, make_stack


@settings(max_examples=10)
@given(
    st.sampled_from([(32, 8), (160, 27), (256, 96)]),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 128, -1]),
    st.booleans(),
    st.booleans(),
)
def test_there_and_back_is_the_identity(shape, bits, group_size, sym, act_order):
    k, n = shape
    w, dense = make_stack(0, 2, k=k, n=n, bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    tiled = tile(w)
    back = untile(tiled)
    assert jax.tree.structure(back) == jax.tree.structure(w)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(dequantize(tiled), dense, rtol=1e-6)
    assert (tiled.shape, tiled.lead, tiled.num_experts) == ((k, n), (2,), 2)


def test_a_plane_is_a_nibble_of_each_container():
    codes = np.arange(128) % 16
    words = sum(codes[i::8].astype(np.uint32) << np.uint32(4 * i) for i in range(8))
    w, _ = make_linear(0, k=128, n=1, group_size=128)
    w = dataclasses.replace(w, qweight=jnp.asarray(words)[:, None])
    containers = np.asarray(tile(w).words)[0, 0]
    for j in range(4):
        np.testing.assert_array_equal(containers >> (4 * j) & 15, codes[32 * j : 32 * (j + 1)])


def test_tiling_works_under_jit_and_one_entry_can_be_taken():
    w, dense = make_stack(0, 3, k=64, n=16, group_size=32)
    tiled = jax.jit(tile)(w)
    assert is_weight(tiled) and not is_weight(dense)
    np.testing.assert_allclose(dequantize(tiled[1]), dense[1], rtol=1e-6)
    with pytest.raises(ShapeError, match="this TiledLinear is a single matrix and has no leading axis to index"):
        tiled[1][0]
    assert tiled.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tiled))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            dict(bits=2, group_size=32),
            r"tiles hold codes of 4 and 8 bits; this weight has 2\. Use implementation=\"xla",
        ),
        (
            dict(group_size=16),
            r"tiles hold groups of a multiple of 32 inputs, or one group for all of them; this weight",
        ),
    ],
)
def test_what_has_no_tiles_is_refused(sizes, message):
    with pytest.raises(BackendError, match=message):
        tile(make_linear(0, k=64, n=16, **sizes)[0])


def test_arrays_that_do_not_fit_are_named():
    tiled = tile(make_linear(0, k=64, n=16, group_size=32)[0])
    broken = dataclasses.replace(tiled, scales=tiled.scales[:1])
    message = (
        r"scales of this 4-bit TiledLinear with shape=\(64, 16\) and group_size=32 is float16\[1, 64\]; expected a fl"
    )
    with pytest.raises(ShapeError, match=message):
        gptq_matmul(jnp.ones((1, 64)), broken, implementation="xla")
    with pytest.raises(
        ShapeError, match=r"scales of this .* is missing; expected a float array\[2, 64\]\. Make it with"
    ):
        dequantize(dataclasses.replace(tiled, scales=None))
