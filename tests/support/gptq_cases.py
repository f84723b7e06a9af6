"""Random GPTQ weights whose codes, zero points and scales are known, so that what they stand for needs no reading."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels import GptqTensors, PackedLinear, from_gptq
from tests.support.checkpoint_writer import pack_fields, pack_zeros

VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class Case:
    """One weight [K, N]: codes [K, N] in input order, zeros [G, N], float16 scales [G, N], the group of each input."""

    bits: int
    group_size: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray

    def dense(self) -> np.ndarray:
        """float32 [K, N]; no product of a float16 and a small integer is rounded in float32."""
        return self.scales.astype(np.float32)[self.g_idx] * (self.codes - self.zeros[self.g_idx]).astype(np.float32)

    def tensors(self, version: str = "gptq") -> GptqTensors:
        """As a file holds it, packed by the checkpoint writer of these tests."""
        return GptqTensors(
            qweight=np.ascontiguousarray(pack_fields(self.codes.T, self.bits).T),
            qzeros=pack_zeros(self.zeros, self.bits, VERSIONS[version]),
            scales=self.scales,
            g_idx=self.g_idx.astype(np.int32),
        )


def make_case(
    seed: int,
    k: int = 37,
    n: int = 27,
    *,
    bits: int = 4,
    group_size: int = 16,
    sym: bool = False,
    act_order: bool = False,
) -> Case:
    """A random weight; by default neither K nor N fills its words and the last group is short.

    Asymmetric zero points hold 0 and 2**bits - 1 side by side, where version 1 borrows. One scale in eight is a float16
    subnormal.
    """
    rng = np.random.default_rng(seed)
    group_size = k if group_size == -1 else group_size
    groups, top = -(-k // group_size), 2**bits - 1
    zeros = np.full((groups, n), 2 ** (bits - 1)) if sym else rng.integers(0, top + 1, (groups, n))
    if not sym:
        zeros[:, :4] = np.array([0, top, 0, 0])[:n]
    scales = rng.uniform(0.5, 1.5, (groups, n)) / (2**bits * np.sqrt(k) * 0.3)
    subnormal = rng.integers(1, 1024, (groups, n)) * 2.0**-24
    g_idx = np.arange(k) // group_size
    return Case(
        bits=bits,
        group_size=group_size,
        codes=rng.integers(0, top + 1, (k, n)),
        zeros=zeros,
        scales=np.where(rng.random((groups, n)) < 1 / 8, subnormal, scales).astype(np.float16),
        g_idx=rng.permutation(g_idx) if act_order else g_idx,
    )


def make_linear(
    seed: int, *, sym: bool = False, act_order: bool = False, **sizes: int
) -> tuple[PackedLinear, np.ndarray]:
    """A packed weight on the device and the float32 weight [K, N] it stands for."""
    case = make_case(seed, sym=sym, act_order=act_order, **sizes)
    packed = from_gptq(case.tensors(), case.bits, case.group_size, sym=sym, act_order=act_order or None)
    return jax.tree.map(jnp.asarray, packed), case.dense()


def make_stack(
    seed: int, experts: int, *, sym: bool = False, act_order: bool = False, **sizes: int
) -> tuple[PackedLinear, np.ndarray]:
    """Packed experts [E, K, N] on the device and the float32 weights [E, K, N] they stand for."""
    made = [make_linear(1000 * seed + e, sym=sym, act_order=act_order, **sizes) for e in range(experts)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in made)), np.stack([d for _, d in made])
