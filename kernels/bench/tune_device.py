"""How tune.py runs a case: random weights and routing, the program that is timed, and whether its numbers are right."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_table import random_stack
from tune_cases import Case
from tune_parts import cut_of
from tune_rings import ring_of
from tune_routing import places, routing, tokens_share

from ferrum_kernels import (
    dequantize,
    mosaic_few,
    mosaic_matmul,
    triton_few,
    triton_norm,
    triton_place,
    triton_route,
    triton_rows,
)
from ferrum_kernels.blocks import max_blocks
from ferrum_kernels.tiles import TiledLinear, untile
from ferrum_kernels.triton_matmul import Rows, product
from ferrum_kernels.triton_tiles import fit

LARGEST_ERROR = 4e-3  # of a product rounded to bfloat16, against float32
COLD = 96 * 2**20  # bytes of single matrices in rotation, about twice what a GPU's cache holds
MOST_KERNELS = 24  # of a program: each is compiled anew, though they are alike
SAMPLES = 8  # rows that are checked
RING_SAMPLES = 24  # of a ring, which multiplies blocks of few rows otherwise than full ones
SECONDS = 4e-3  # of work that is queued for one measurement


@dataclasses.dataclass(frozen=True)
class Program:
    """What is timed.

    Attributes:
      step: a traceable function whose results are lists of arrays.
      arguments: of it.
      kernels: how many times it runs the kernel.
      error: of its results: the relative error of some rows of the first kernel.
    """

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: int
    error: Callable[[Any], float]

    def lower(self) -> Any:
        """`step` lowered with the memory of its results as another argument, first, which is donated.

        A CUDA graph is launched as it is only where its memory lies where it did, so results go where the last ones
        were. Otherwise the host changes every kernel of the graph at every call, and small kernels wait for it.
        """

        def step(results: Any, *arguments: Any) -> Any:
            return self.step(*arguments)

        jitted = jax.jit(step, donate_argnums=0, keep_unused=True)
        return jitted.lower(jax.eval_shape(self.step, *self.arguments), *self.arguments)

    def memory(self) -> Any:
        """Memory for the results; NaN, so that what is not written shows."""
        results = jax.eval_shape(self.step, *self.arguments)
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, _nothing(leaf.dtype), leaf.dtype), results)


class Bench:
    """Weights and routing of the shapes that are tuned, made once on the device and shared by all cases.

    Args:
      d: hidden size.
      f: intermediate size.
      experts: of a layer.
      top_k: of them for each token.
      layers: in rotation.
      interpret: run without a GPU.
    """

    def __init__(self, d: int, f: int, experts: int, top_k: int, layers: int, interpret: bool = False):
        self.experts, self.top_k, self.layers, self.interpret = experts, top_k, layers, interpret
        self.stacks = {
            "up": random_stack(1, (layers, experts), d, 2 * f, 128),
            "down": random_stack(2, (layers, experts), f, d, 128),
        }
        self._made: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.RLock()

    def program(self, case: Case) -> Program:
        """The program of a case; safe to call in threads."""
        makers = {"place": self._place, "rows": self._rows, "few_up": self._few, "few_down": self._few}
        makers |= {"parts": self._parts, "whole": self._parts, "ring_up": self._ring, "ring_down": self._ring}
        makers["ring_both"] = self._both
        make = makers.get(case.product, self._experts)
        return make(case)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    def _tables(self, pairs: int, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """The expert of each block, its first place and how many, and the pair at each place."""

        def make() -> tuple[jax.Array, ...]:
            blocks = max_blocks(pairs, self.experts, sizes[-1])
            tables = places(routing(0, pairs, self.experts, self.top_k), self.experts, sizes, blocks)
            return tuple(map(jnp.asarray, tables))

        return self._once(("tables", pairs, sizes), make)

    def _inputs(self, case: Case) -> tuple[jax.Array, jax.Array | None]:
        """Activations, and for down the weight of each pair."""
        gated, pairs = case.product in ("up", "few_up"), case.load
        rows = pairs // tokens_share(pairs, self.top_k) if gated else pairs

        def make() -> tuple[jax.Array, jax.Array | None]:
            a, b = jax.random.split(jax.random.key(pairs))
            x = jax.random.normal(a, (rows, case.k), jnp.bfloat16)
            return x, None if gated else jax.random.uniform(b, (pairs,))

        return self._once(("inputs", case.product, pairs), make)

    def _experts(self, case: Case) -> Program:
        block, pairs, gated = case.cut[0], case.load, case.product == "up"
        stack = self.stacks[case.product]
        blocks, share = max_blocks(pairs, self.experts, block), tokens_share(pairs, self.top_k)
        # Large results of many layers would not fit.
        layers = self.layers if pairs <= 2048 else min(self.layers, 8)

        # One trace for all layers: only the number differs.
        @jax.jit
        def one(x: jax.Array, weights: Any, tables: Any, layer: jax.Array, w: TiledLinear) -> jax.Array:
            per_row = share if gated else 0  # down reads the rows that gate and up have written by place
            rows = Rows(block, *tables[:3], order=tables[3], pairs_per_row=per_row, by_pair=not gated)
            dtype = jnp.bfloat16 if gated or pairs >= 4096 else jnp.float32
            how = {"gated": gated, "weights": weights, "interpret": self.interpret}
            return product(x, w, layer, rows, blocks, pairs, case.tile, dtype, **how)

        # The same rows for every layer: few arguments, so that the host queues calls faster than they run.
        def step(x: jax.Array, weights: Any, tables: Any, w: TiledLinear) -> list[jax.Array]:
            return [one(x, weights, tables, jnp.int32(layer), w) for layer in range(layers)]

        def error(results: list[jax.Array]) -> float:
            rows, expected = self._once(("expected", case.product, pairs), lambda: self._expected(case))
            return relative(results[0][rows], expected)

        return Program(step, (*self._inputs(case), self._tables(pairs, (block,)), stack), layers, error)

    def _expected(self, case: Case) -> tuple[np.ndarray, jax.Array]:
        """Some rows of the first call's result, and what they are in float32."""
        pairs, gated = case.load, case.product == "up"
        x, weights = self._inputs(case)
        ids = routing(0, pairs, self.experts, self.top_k)
        order = np.argsort(ids, kind="stable")
        place = np.random.default_rng(0).permutation(pairs)[:SAMPLES]
        pair = order[place]
        stack = self.stacks[case.product]
        dense = dequantize(untile(jax.tree.map(lambda leaf: leaf[0][ids[pair]], stack)), jnp.float32)
        source = x[pair // tokens_share(pairs, self.top_k) if gated else place].astype(jnp.float32)
        y = jnp.einsum("pk,pkn->pn", source, dense, precision="highest")
        if weights is None:
            gate, up = jnp.split(y, 2, axis=-1)
            return place, jax.nn.silu(gate) * up
        return pair, y * weights[pair][:, None]

    def _few(self, case: Case) -> Program:
        pairs, gated = case.load, case.product == "few_up"
        share = tokens_share(pairs, self.top_k)
        stack = self.stacks[case.product.removeprefix("few_")]
        x, weights = self._inputs(case)
        live = routing(0, pairs, self.experts, self.top_k).reshape(-1, share)

        @jax.jit
        def one(x: jax.Array, weights: Any, live: jax.Array, layer: jax.Array, w: TiledLinear) -> jax.Array:
            if gated:
                return triton_few.gated(x, w, layer, case.few, share, live=live, interpret=self.interpret)[0]
            weights = weights.reshape(live.shape)
            return triton_few.down(x, live, weights, w, layer, case.few, interpret=self.interpret)

        def step(x: jax.Array, weights: Any, live: jax.Array, w: TiledLinear) -> list[jax.Array]:
            return [one(x, weights, live, jnp.int32(layer), w) for layer in range(self.layers)]

        def expected() -> jax.Array:
            """float32 rows of the first token: of its pairs, or their weighted sum."""
            dense = dequantize(untile(jax.tree.map(lambda leaf: leaf[0][live[0]], stack)), jnp.float32)
            rows = jnp.broadcast_to(x[:1], (share, case.k)) if gated else x[:share]
            y = jnp.einsum("pk,pkn->pn", rows.astype(jnp.float32), dense, precision="highest")
            if weights is None:
                gate, up = jnp.split(y, 2, axis=-1)
                return jax.nn.silu(gate) * up
            return (y * weights[:share, None]).sum(0, keepdims=True)

        def error(results: list[jax.Array]) -> float:
            y = self._once(("expected", case.product, pairs), expected)
            return relative(results[0][: len(y), : y.shape[1]], y)

        return Program(step, (x, weights, jnp.asarray(live), stack), self.layers, error)

    def _matrices(self, case: Case) -> tuple[TiledLinear, jax.Array, np.ndarray, jax.Array]:
        """A stack of single matrices, activations, some of their rows and those times the first matrix in float32."""
        m, k, n = case.load, case.k, case.n

        def make() -> tuple[TiledLinear, jax.Array, np.ndarray, jax.Array]:
            # More matrices than the cache holds, but for small ones, which then come from it.
            w = random_stack(3, (min(MOST_KERNELS, max(self.layers, COLD // (k * n // 2))),), k, n, 128)
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            rows = np.random.default_rng(0).permutation(m)[:SAMPLES]
            dense = dequantize(untile(w[0]), jnp.float32)
            return w, x, rows, jnp.matmul(x[rows].astype(jnp.float32), dense, precision="highest")

        return self._once(("rows", m, k, n), make)

    def _rows(self, case: Case) -> Program:
        block, m = case.cut[0], case.load
        w, x, rows, expected = self._matrices(case)

        @jax.jit
        def one(x: jax.Array, layer: jax.Array, w: TiledLinear) -> jax.Array:
            rows = Rows(block)
            return product(x, w, layer, rows, -(-m // block), m, case.tile, jnp.bfloat16, interpret=self.interpret)

        def step(x: jax.Array, w: TiledLinear) -> list[jax.Array]:
            return [one(x, jnp.int32(i), w) for i in range(w.lead[0])]

        return Program(step, (x, w), w.lead[0], lambda results: relative(results[0][rows], expected))

    def _parts(self, case: Case) -> Program:
        """A product in parts or whole, and the norm that reads it; the stream it is added to is zero."""
        m, whole = case.load, case.product == "whole"
        w, x, rows, expected = self._matrices(case)
        cut = triton_rows.cut_for(m, case.n, case.blocks) if whole else cut_of(case)
        if cut is None:
            raise ValueError(f"{case.key} is not cut into parts; measure the whole product.")

        def multiply(x: jax.Array, w: TiledLinear, layer: jax.Array) -> jax.Array:
            if whole and m > triton_rows.MOST:
                tile, block = fit(case.tile, case.columns, case.blocks), case.cut[0]
                blocks = -(-m // block)
                return product(x, w, layer, Rows(block), blocks, m, tile, jnp.bfloat16, interpret=self.interpret)
            return triton_rows.product(x, w, layer, cut, jnp.bfloat16 if whole else jnp.float32, self.interpret)

        @jax.jit
        def one(x: jax.Array, stream: jax.Array, weight: jax.Array, layer: jax.Array, w: TiledLinear) -> jax.Array:
            y = multiply(x, w, layer)
            return triton_norm.add_norm(stream, y, weight, None, 1e-6, self.interpret)[0]

        def step(x: jax.Array, stream: jax.Array, weight: jax.Array, w: TiledLinear) -> list[jax.Array]:
            return [one(x, stream, weight, jnp.int32(i), w) for i in range(w.lead[0])]

        norm = jnp.zeros((m, case.n), jnp.bfloat16), jnp.ones(case.n, jnp.bfloat16)
        return Program(step, (x, *norm, w), w.lead[0], lambda results: relative(results[0][rows], expected))

    def _ring(self, case: Case) -> Program:
        ring, pairs, gated = ring_of(case), case.load, case.product == "ring_up"
        stack, share = self.stacks[case.product.removeprefix("ring_")], tokens_share(pairs, self.top_k)
        layers = self.layers if pairs <= 2048 else min(self.layers, 8)
        tables = self._tables(pairs, ring.columns)
        slots = len(tables[0]) * ring.block

        def inputs() -> jax.Array:
            """Tokens, or rows in blocks as gate and up leave them."""
            rows = pairs // share if gated else slots
            return jax.random.normal(jax.random.key(pairs), (rows, case.k), jnp.bfloat16)

        x = self._once(("inputs", case.product, pairs, ring.block), inputs)

        @jax.jit
        def one(x: jax.Array, tables: Any, layer: jax.Array, w: TiledLinear) -> jax.Array:
            rows = Rows(ring.block, *tables[:3], order=tables[3])
            how = {"gated": gated, "pairs_per_row": share if gated else 0, "by_pair": not gated}
            return mosaic_matmul.product(x, w, layer, rows, slots if gated else pairs, ring, **how)

        def step(x: jax.Array, tables: Any, w: TiledLinear) -> list[jax.Array]:
            return [one(x, tables, jnp.int32(layer), w) for layer in range(layers)]

        def expected() -> tuple[np.ndarray, np.ndarray, jax.Array]:
            """All rows of the first result that must be written, some of them, and what those are in float32."""
            experts, starts, counts, order = map(np.asarray, tables)
            used = int((counts > 0).sum())
            by_place = np.argsort(starts[:used])
            block = np.repeat(by_place, counts[:used][by_place])  # of each place
            slot = block * ring.block + np.arange(pairs) - starts[block]
            to = slot if gated else order
            place = np.random.default_rng(0).permutation(pairs)[:RING_SAMPLES]
            at = experts[block[place]]
            dense = dequantize(untile(jax.tree.map(lambda leaf: leaf[0][at], stack)), jnp.float32)
            source = x[order[place] // share if gated else slot[place]].astype(jnp.float32)
            y = jnp.einsum("pk,pkn->pn", source, dense, precision="highest")
            if gated:
                gate, up = jnp.split(y, 2, axis=-1)
                y = jax.nn.silu(gate) * up
            return to, to[place], y

        def error(results: list[jax.Array]) -> float:
            rows, some, y = self._once(("expected", case.product, pairs, ring.columns), expected)
            written = bool(jnp.isfinite(results[0][rows]).all())
            return relative(results[0][some], y) if written else float("inf")

        return Program(step, (x, tables, stack), layers, error)

    def _both(self, case: Case) -> Program:
        """Both products of a layer in one kernel."""
        ring, pairs, share = ring_of(case), case.load, tokens_share(case.load, self.top_k)
        layers = self.layers if pairs <= 2048 else min(self.layers, 8)
        *blocks, order = self._tables(pairs, ring.columns)
        places = order, *blocks, jnp.zeros_like(blocks[0])
        x = jax.random.normal(jax.random.key(pairs), (pairs // share, case.k), jnp.bfloat16)

        @jax.jit
        def one(x: jax.Array, places: Any, layer: jax.Array, up: TiledLinear, down: TiledLinear) -> jax.Array:
            return mosaic_few.experts(x, up, down, layer, places, share, pairs, ring)

        def step(x: jax.Array, places: Any, *stacks: TiledLinear) -> list[jax.Array]:
            return [one(x, places, jnp.int32(layer), *stacks) for layer in range(layers)]

        def expected() -> tuple[np.ndarray, jax.Array]:
            """Some pairs, and what those are in float32."""
            some = np.random.default_rng(0).permutation(pairs)[:RING_SAMPLES]
            expert = routing(0, pairs, self.experts, self.top_k)[some]
            y = x[some // share].astype(jnp.float32)
            for name in ("up", "down"):
                stack = jax.tree.map(lambda leaf: leaf[0][expert], self.stacks[name])
                y = jnp.einsum("pk,pkn->pn", y, dequantize(untile(stack), jnp.float32), precision="highest")
                if name == "up":
                    gate, up = jnp.split(y, 2, axis=-1)
                    y = jax.nn.silu(gate) * up
            return some, y

        def error(results: list[jax.Array]) -> float:
            some, y = self._once(("expected", case.product, pairs), expected)
            return relative(results[0][some], y) if bool(jnp.isfinite(results[0]).all()) else float("inf")

        return Program(step, (x, places, self.stacks["up"], self.stacks["down"]), layers, error)

    def _place(self, case: Case) -> Program:
        pairs = case.load
        blocks = max_blocks(pairs, self.experts, case.cut[-1])
        # Other pairs for every kernel, as two alike would be one; constants, so that the program has no arguments.
        ids = [
            routing(i, pairs, self.experts, self.top_k).reshape(-1, tokens_share(pairs, self.top_k)) for i in range(8)
        ]
        counts = [np.asarray(triton_route.count(jnp.asarray(live), self.experts)) for live in ids]

        @jax.jit
        def one(live: jax.Array, counts: jax.Array) -> Any:
            return triton_place.place(live, counts, self.experts, case.cut, blocks, self.interpret)

        def step() -> Any:
            first, *rest = (one(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(ids, counts, strict=True))
            return [first, *(order for order, *_ in rest)]

        def error(results: Any) -> float:
            order, *tables, zeros = map(np.asarray, results[0])
            *expected, pair = map(np.asarray, self._tables(pairs, case.cut))
            same = [(a == b).all() for a, b in zip((order, *tables), (pair, *expected), strict=True)]
            return 0.0 if all(same) and not zeros.any() else float("inf")

        return Program(step, (), len(ids), error)


def _nothing(dtype: Any) -> Any:
    return jnp.nan if jnp.issubdtype(dtype, jnp.floating) else -1


@jax.jit
def _relative(actual: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.linalg.norm(actual.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def relative(actual: jax.Array, expected: jax.Array) -> float:
    """||actual - expected|| / ||expected||; infinite where it is not a number."""
    error = float(_relative(actual, expected))
    return error if error == error else float("inf")
