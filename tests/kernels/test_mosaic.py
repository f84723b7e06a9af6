"""The Mosaic GPU kernels: which layers go to them, what a device without them is told, and that they lower for CUDA."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ferrum_kernels import gptq_matmul, mosaic, tile, triton, triton_route
from ferrum_kernels.errors import BackendError
from ferrum_kernels.mosaic_matmul import Ring
from ferrum_kernels.tiles import TiledLinear
from tests.support.gptq_cases import make_stack
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda

pytestmark = ignore_deprecation
STRUCT = jax.ShapeDtypeStruct


def stack(k: int, n: int, experts: int = 128, **fields) -> TiledLinear:
    words, scales = STRUCT((2, experts, k // 128, n, 32), jnp.uint16), STRUCT((2, experts, k // 128, n), jnp.float16)
    return TiledLinear(words, scales, group_size=128, shape=(k, n), **fields)


needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need jax 0.11")
FEW = Ring((8,), parts=1, stages=6, lag=3, warpgroups=4)
ALONE = Ring((8, 16, 32), alone=True)
SHARED = dataclasses.replace(ALONE, shared=True)


def lowered(tokens: int, ring: Ring, layers: int = 1, width: int = 2048, batch: tuple[int, ...] = ()) -> str:
    def run(x, live, weights, counts, gate_up, down):
        for layer in range(layers):
            x = mosaic.run_experts(x, live, weights, counts, gate_up, down, layer, ring, ring)
        return x

    pairs, weights = (STRUCT((*batch, tokens, 8), dtype) for dtype in (jnp.int32, jnp.float32))
    counts = STRUCT((*batch, triton_route.chunks(tokens), 128), jnp.int32)
    args = pairs, weights, counts, stack(width, 1536), stack(768, width)
    if batch:
        run = jax.vmap(run, (0, 0, 0, 0, None, None))
    return lower_for_cuda(run, STRUCT((*batch, tokens, width), jnp.bfloat16), *args)


def kernels_of(text: str) -> set[str]:
    return set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text))


@needs_jax_0_11
@pytest.mark.parametrize(
    ("tokens", "ring"),
    [
        (300, Ring()),
        (300, Ring((16, 32, 48, 64), parts=1, stages=8)),
        (16, FEW),
        (64, Ring((8, 24), stages=9)),
        (64, ALONE),
        (16, SHARED),
    ],
)
def test_a_layer_lowers_for_cuda(tokens, ring):
    names = {"gptq_experts"} if ring.alone else {"gptq_gated", "gptq_product"}
    assert set(re.findall(r"(gptq_\w+)_mosaic_gpu", lowered(tokens, ring))) == names


@needs_jax_0_11
@pytest.mark.parametrize("ring", [FEW, ALONE, SHARED])
def test_equal_kernels_are_compiled_once_whatever_was_lowered_before(ring):
    kernels = kernels_of(lowered(64, ring, 3))
    assert len(kernels) == (1 if ring.alone else 2)
    lowered(16, ring)
    assert kernels_of(lowered(64, ring, 2)) == kernels


@needs_jax_0_11
@pytest.mark.parametrize("ring", [FEW, ALONE, SHARED])
def test_layers_under_vmap_lower_for_cuda(ring):
    assert len(kernels_of(lowered(64, ring, batch=(3,)))) == (1 if ring.alone else 2)


@needs_jax_0_11
def test_no_more_groups_are_under_way_than_a_tile_has():
    two, three, four = (kernels_of(lowered(64, dataclasses.replace(FEW, lag=lag), width=256)) for lag in (2, 3, 4))
    assert two == three == four


def test_few_tokens_stay_with_triton():
    assert [mosaic.rings(8 * tokens, 128) for tokens in (1, 4, 8)] == [None] * 3


def test_blocks_grow_with_the_load():
    cuts = [mosaic.rings(8 * tokens, 128) or () for tokens in (9, 16, 32, 64, 128, 256, 512, 1024, 4096)]
    assert [[ring.block for ring in cut] for cut in cuts] == [[n, n] for n in (*[32] * 6, 64, 96, 128)]
    # The registers of four warpgroups hold one part each, and shared memory the ring and what is written.
    for ring in {ring for cut in cuts for ring in cut}:
        assert ring.parts == 1 or ring.warpgroups == 2
        group = ring.outputs * (64 + 2) + ring.block * 256
        assert ring.stages * group + ring.warpgroups * ring.block * 128 < 227 * 1024


@pytest.mark.parametrize(
    ("gate_up", "down", "dtype", "taken"),
    [
        (stack(2048, 1536), stack(768, 2048), "bfloat16", True),
        (stack(2048, 1536), stack(768, 2048), "float16", False),
        (stack(2048, 1536, zeros=STRUCT((), jnp.uint8)), stack(768, 2048), "bfloat16", False),
        (stack(2048, 1536), stack(768, 2048, perm=STRUCT((), jnp.int32)), "bfloat16", False),
        (stack(2048, 1536, bits=8), stack(768, 2048), "bfloat16", False),
        (stack(2048, 1408), stack(704, 2048), "bfloat16", False),
        (stack(2048, 1536), dataclasses.replace(stack(768, 2048), scales=STRUCT((), jnp.float32)), "bfloat16", False),
    ],
)
def test_which_weights_are_taken(gate_up, down, dtype, taken):
    assert mosaic.takes(jnp.zeros((1, 2048), dtype), gate_up, down) is taken


def test_rows_beyond_the_reach_of_offsets_are_not_taken():
    for tokens, taken in ((2**20 - 1, True), (2**20, False)):
        x: Any = STRUCT((tokens, 2048), jnp.bfloat16)
        assert mosaic.takes(x, stack(2048, 1536), stack(768, 2048)) is taken


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2")
def test_a_layer_that_is_not_taken_runs_on_triton():
    up, down = (tile(make_stack(1, 4, k=k, n=128, group_size=32)[0]) for k in (128, 64))
    logits = jnp.array([[3.0, 1, 2, 0], [0, 2, 1, 3]])
    layer = jnp.ones((2, 128), jnp.bfloat16), logits, None, 2, True, up, down, None
    with triton.interpreted():
        for mine, other in zip(mosaic.routed_experts(*layer)[:3], triton.routed_experts(*layer), strict=False):
            assert (mine == other).all()


def test_a_device_without_them_is_told_what_to_do():
    message = (
        r'implementation="mosaic" cannot run: it needs an NVIDIA GPU; the default device is .*\. Leave '
        r'implementation out for the best one here, or use "xla"\.'
    )
    w = tile(make_stack(1, 1, k=32, n=64, group_size=32)[0])
    w = jax.tree.map(lambda a: a[0], w)
    with pytest.raises(BackendError, match=message):
        gptq_matmul(jnp.ones((1, 32), jnp.bfloat16), w, implementation="mosaic")


class Card:
    platform, device_kind = "gpu", "NVIDIA A100"

    def __init__(self, capability: str):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "version", "problem"),
    [
        ("8.0", (0, 11, 0), "it needs a Hopper GPU, compute capability 9.0; NVIDIA A100 has 8.0"),
        ("10.0", (0, 11, 0), "it needs a Hopper GPU, compute capability 9.0; NVIDIA A100 has 10.0"),
        ("9.0", (0, 10, 2), f"it needs jax 0.11 or later; this is {jax.__version__}"),
    ],
)
def test_other_cards_and_versions_are_told_apart(monkeypatch, capability, version, problem):
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [Card(capability)])
    monkeypatch.setattr(jax, "__version_info__", version)
    assert mosaic.unavailable() == problem


WHOLE = "and programs of its kernels wait for each other, so that they need the whole GPU"
CONCURRENT = f"XLA_FLAGS lets kernels run side by side (xla_gpu_command_buffer_scheduling_mode=CONCURRENT), {WHOLE}"
CONCURRENT += "; leave that flag out"
MPS = f"CUDA_MPS_PIPE_DIRECTORY lets processes share the GPU, {WHOLE}; unset it where this process is alone"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("XLA_FLAGS", "--xla_a=1 --xla_gpu_command_buffer_scheduling_mode=CONCURRENT --xla_b=2", CONCURRENT),
        ("XLA_FLAGS", "--xla_gpu_command_buffer_scheduling_mode=1", CONCURRENT),
        ("CUDA_MPS_PIPE_DIRECTORY", "/tmp", MPS),
        ("XLA_FLAGS", "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE", None),
        ("XLA_FLAGS", "--xla_gpu_command_buffer_scheduling_mode=LHS", None),
    ],
)
def test_where_other_kernels_may_run_beside_them_they_do_not(monkeypatch, name, value, problem):
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [Card("9.0")])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    monkeypatch.setenv(name, value)
    found = mosaic.unavailable()
    # An older jax has no such backend, which is looked for last.
    assert found == problem or (
        problem is None and found == f"jax {jax.__version__} has no Mosaic GPU backend of Pallas"
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need jax 0.11")
def test_a_product_of_many_rows_lowers_for_cuda():
    w = STRUCT((2, 16, 512, 32), jnp.uint16), STRUCT((2, 16, 512), jnp.float16)
    one = TiledLinear(*w, group_size=128, shape=(2048, 512))

    def kernels(rows: int, dtype: str, w: TiledLinear = one) -> list[str]:
        x = STRUCT((rows, 2048), jnp.bfloat16)
        text = lower_for_cuda(lambda x, w: mosaic.gptq_matmul(x, w, 1, jnp.dtype(dtype)), x, w)
        return re.findall(r"gptq_product_mosaic_gpu", text)

    assert kernels(513, "bfloat16")
    assert not kernels(513, "float32")
    assert not kernels(511, "bfloat16")
    # Of a large tile the shared memory has no room for them.
    assert not kernels(8192, "bfloat16", dataclasses.replace(one, scales=STRUCT((2, 16, 512), jnp.float32)))


def test_a_matrix_is_cut_for_all_multiprocessors():
    for rows, outputs, tiles in ((512, 5120, 20 * 4), (1024, 5120, 40 * 8), (1024, 2048, 16 * 8), (4096, 2048, 8 * 32)):
        ring = mosaic.matrix_ring(rows, outputs, 132)
        assert -(-rows // ring.block) * (outputs // ring.outputs) == tiles
