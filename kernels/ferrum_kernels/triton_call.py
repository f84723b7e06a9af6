"""The call of a kernel of Pallas's Triton backend: its programs see all of every array, and take what they like."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def call(
    kernel: Callable[..., None],
    given: Sequence[jax.Array],
    out: Any,
    grid: tuple[int, ...],
    name: str,
    *,
    warps: int,
    stages: int = 1,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> Any:
    """Run a kernel.

    Args:
      kernel: (refs of what is given, refs of its outputs) -> None.
      given: arrays.
      out: shapes of the outputs, a jax.ShapeDtypeStruct or several.
      grid: of programs.
      name: of the kernel, in profiles.
      warps: of a program.
      stages: turns of a loop whose loads are in flight.
      aliases: outputs that are written in place, by the number of what is given.
      interpret: run without a GPU.

    Returns:
      Arrays as `out`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        in_specs=[_whole(x.ndim) for x in given],
        out_specs=jax.tree.map(lambda x: _whole(len(x.shape)), out),
        input_output_aliases=dict(aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*given)


@functools.cache
def _whole(rank: int) -> Any:
    """All of an array. JAX traces where blocks lie once for each of these, not for each array of each kernel."""
    from jax.experimental import pallas as pl

    return pl.BlockSpec(index_map=lambda *_: (0,) * rank)
