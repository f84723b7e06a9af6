"""One expert layer on an NVIDIA GPU, from router logits to output, beside Marlin's recorded times and the floor.

A call runs several layers one after the other as one CUDA graph, each with its own weights and routing and the next on
the last one's output; of few tokens it runs them several times, each time from new tokens and with new routing, so that
it takes longer than the host takes to queue the next one. Times are of many calls queued behind each other, divided by
the layers. The floor is the time to read the live experts once, or to do the products, whichever is longer, so that
skewed routing has a floor of its own.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_state
import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels import default_implementation, dequantize, mosaic, triton
from ferrum_kernels.tiles import TiledLinear, untile

# vLLM 0.24's moe_wna16_marlin_gemm with moe_align_block_size, silu_and_mul and moe_sum, in a CUDA graph, without the
# router; microseconds by tokens. The H200's were taken on 2026-11-22, the H100's on 2026-11-27.
MARLIN = {
    ("H200", "qwen3-30b-a3b"): {
        **{1: 30.5, 2: 37.1, 4: 49.5, 8: 69.4, 16: 95.6, 32: 121.1, 64: 134.8, 128: 146.0, 256: 209.6, 512: 271.3},
        **{1024: 485.5, 2048: 796.9, 4096: 1413.2},
    },
    ("H100", "qwen3-30b-a3b"): {
        **{1: 29.6, 2: 39.0, 4: 51.2, 8: 74.7, 16: 102.2, 32: 130.7, 64: 146.2, 128: 157.6, 256: 214.5, 512: 269.5},
        **{1024: 499.6, 2048: 810.8, 4096: 1441.4},
    },
    ("H200", "mixtral-8x7b"): {1: 83, 4: 160, 16: 251, 64: 372, 256: 905, 1024: 2756, 4096: 10343},
    ("H100", "mixtral-8x7b"): {1: 89.4, 4: 212.0, 16: 289.3, 64: 383.4, 256: 925.4, 1024: 2931.0, 4096: 10409.3},
}
READ = {"H200": 4.65e12, "H100": 3.1e12}  # bytes a second of a plain read, measured
PRODUCTS = 790e12  # bfloat16 operations a second of a large product, measured
# Of a layer in bfloat16, whose gated rows and result are rounded, and with many pairs, and by the
# Mosaic GPU kernels, each pair's output as well. One rounding is 1.7e-3, they are independent, and few numbers scatter.
LARGEST_ERROR, OF_MANY_PAIRS = 2.9e-3, 3.3e-3
CHECKED = 32  # tokens whose result is compared
FEW, ROUNDS = 64, 4  # tokens up to which a call runs its layers so often


def device() -> str:
    """ "H100", "H200", or the whole name of another device."""
    kind = jax.devices()[0].device_kind
    return next((name for name in READ if name in kind), kind)


def random_stack(seed: int, lead: tuple[int, ...], k: int, n: int, group: int) -> TiledLinear:
    """Random codes and scales made on the device; symmetric, 4 bits."""
    a, b = jax.random.split(jax.random.key(seed))
    words = jax.jit(lambda key: jax.random.bits(key, (*lead, k // 128, n, 32), jnp.uint16))(a)
    scales = jax.jit(lambda key: jax.random.uniform(key, (*lead, k // group, n), minval=0.5, maxval=1.5))(b)
    return TiledLinear(words, (scales / (4.8 * k**0.5)).astype(jnp.float16), group_size=group, shape=(k, n))


def route_logits(rng: np.random.Generator, tokens: int, experts: int, routing: str) -> np.ndarray:
    """float32 [T, E]: uniform, by Zipf's law, or all tokens to the same experts."""
    logits = rng.standard_normal((tokens, experts))
    if routing == "zipf":
        logits = rng.gumbel(size=(tokens, experts)) - np.log(np.arange(1, experts + 1))
    if routing == "one":
        logits = logits - np.arange(experts) * 100
    return logits.astype(np.float32)


def rows(
    cfg: Any,
    name: str,
    tokens: list[int],
    layers: int,
    repeats: int,
    routing: str,
    check: bool = False,
    implementation: str | None = None,
) -> Iterator[dict[str, Any]]:
    """One measurement per number of tokens; with `check` each is preceded by a comparison with float32.

    Raises:
      ValueError: a result is wrong, or not the same twice.
    """
    d, f, e, top_k = cfg.hidden_size, cfg.moe_intermediate_size or cfg.intermediate_size, cfg.num_experts, cfg.top_k
    stacks = random_stack(1, (layers, e), d, 2 * f, 128), random_stack(2, (layers, e), f, d, 128)
    routed_experts = backend(implementation).routed_experts
    for count in tokens:
        rng = np.random.default_rng(count)
        rounds = ROUNDS if count <= FEW else 1
        logits = [[jnp.asarray(route_logits(rng, count, e, routing)) for _ in range(layers)] for _ in range(rounds)]
        xs = [jnp.asarray(rng.standard_normal((count, d)), cfg.dtype) for _ in range(rounds)]

        def run(memory: Any, xs: list[jax.Array], logits: list[list[jax.Array]], stacks: Any) -> Any:
            _, arrived = memory
            ends = []
            for x, routes in zip(xs, logits, strict=True):
                for layer, route in enumerate(routes):
                    x, _, _, arrived = routed_experts(x, route, None, top_k, True, *stacks, layer, arrived)
                ends.append(x)
            return ends, arrived

        def memory(xs: list[jax.Array] = xs) -> Any:
            return [jnp.copy(x) for x in xs], jnp.zeros(1, jnp.int32)

        began = time.perf_counter()
        # The result takes the last result's memory: a CUDA graph whose memory has moved is changed first.
        step = jax.jit(run, donate_argnums=0, keep_unused=True).lower(memory(), xs, logits, stacks).compile()
        compile_seconds = time.perf_counter() - began
        error = checked(stacks, count, top_k, routing, cfg.dtype, implementation) if check else None
        per_layer = 1e6 / layers / rounds
        took = [seconds * per_layer for seconds in times(step, memory(), (xs, logits, stacks), repeats)]
        clocks = gpu_state.clocks_under(lambda: jax.block_until_ready(step(memory(), xs, logits, stacks)))  # noqa: B023
        chosen = np.argsort(-np.asarray(logits), axis=-1)[..., :top_k].reshape(rounds * layers, -1)
        live = float(np.mean([len(np.unique(layer)) for layer in chosen]))
        nbytes = sum(stack.nbytes for stack in stacks) / layers / e * live
        flops = 6 * count * top_k * d * f
        floor = 1e6 * max(nbytes / READ.get(device(), np.nan), flops / PRODUCTS)
        marlin = MARLIN.get((device(), name), {}).get(count) if routing == "uniform" else None
        median = statistics.median(took)
        yield {
            "tokens": count,
            "microseconds": median,
            "least_microseconds": min(took),
            "live_experts": live,
            "floor_microseconds": floor,
            "of_floor": floor / median,
            "times_floor": median / floor,
            "marlin_microseconds": marlin,
            "times_faster": marlin and marlin / median,
            "terabytes_per_second": nbytes / median / 1e6,
            "teraflops": flops / median / 1e6,
            "compile_seconds": compile_seconds,
            "relative_error": error,
            "clocks": clocks,
            "cut": _cut(count, top_k, *stacks, implementation),
        }


def times(
    step: Callable[..., Any], memory: Any, arguments: Sequence[Any], repeats: int, seconds: float = 0.01
) -> list[float]:
    """Seconds per call, two to 50 calls queued behind each other, about `seconds` of work.

    Args:
      step: compiled; its first argument is donated memory for its result.
      memory: for the first result.
      arguments: the others.
      repeats: how many times are returned.
      seconds: of work to time at once.
    """
    y = jax.block_until_ready(step(memory, *arguments))
    began = time.perf_counter()
    y = jax.block_until_ready(step(y, *arguments))
    calls = int(min(50, max(2, seconds / (time.perf_counter() - began))))
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            y = step(y, *arguments)
        jax.block_until_ready(y)
        took.append((time.perf_counter() - began) / calls)
    return took


def checked(
    stacks: tuple[TiledLinear, TiledLinear],
    count: int,
    top_k: int,
    routing: str,
    dtype: Any,
    implementation: str | None = None,
) -> float:
    """The relative error of one layer on fresh random inputs, some tokens of it against float32.

    What must not be read is NaN: the scales of other layers and of experts that no token chose. What must be written
    takes memory that held NaN.

    Raises:
      ValueError: the error is larger than two roundings make it, a number is not finite, a second run differs, or other
        experts than the best were chosen.
    """
    up, down = stacks
    layers, experts = up.lead
    rng = np.random.default_rng()
    at = int(rng.integers(layers))
    logits = jnp.asarray(route_logits(rng, count, experts, routing))
    x = jnp.asarray(rng.standard_normal((count, up.k)), dtype)

    @jax.jit
    def run(x: jax.Array, logits: jax.Array, up: TiledLinear, down: TiledLinear) -> tuple[jax.Array, jax.Array]:
        ids, *_ = triton.route(logits, None, top_k, True)
        dead = jnp.ones((layers, experts, 1, 1), bool).at[at, ids.reshape(-1)].set(False)
        up, down = (dataclasses.replace(w, scales=jnp.where(dead, jnp.nan, w.scales)) for w in (up, down))
        zero = jnp.zeros(1, jnp.int32)
        y, ids, *_ = backend(implementation).routed_experts(x, logits, None, top_k, True, up, down, at, zero)
        return y, ids

    for shape in ((count * top_k, down.k), (count * top_k, up.k), (count, up.k)):
        jax.block_until_ready(jnp.full(shape, jnp.nan, jnp.float32)).delete()
    y, ids = run(x, logits, up, down)
    again, _ = run(x, logits, up, down)
    best, _ = jax.lax.top_k(logits, top_k)
    if not bool(jnp.allclose(jnp.take_along_axis(logits, ids, axis=1), best, atol=1e-4)):
        raise ValueError(f"{count} tokens, {routing} routing: the chosen experts are not the best.")
    some = rng.permutation(count)[:CHECKED]
    expected = _float32(up, down, at, x[some], logits[some], np.asarray(ids)[some])
    error = float(jnp.linalg.norm(y[some].astype(jnp.float32) - expected) / jnp.linalg.norm(expected))
    if not bool(jnp.isfinite(y).all()):
        raise ValueError(f"{count} tokens, {routing} routing: the result holds a number that is not finite.")
    if not error <= (most := largest_error(count * top_k, experts, implementation)):
        raise ValueError(f"{count} tokens, {routing} routing: the relative error is {error:.1e}, over {most}.")
    if not bool((y == again).all()):
        raise ValueError(f"{count} tokens, {routing} routing: a second run on the same inputs differs.")
    return error


def largest_error(pairs: int, experts: int, implementation: str | None = None) -> float:
    """What roundings to bfloat16 explain of a layer's relative error."""
    of_pairs = pairs >= triton.MANY_PAIRS or (backend(implementation) is mosaic and mosaic.rings(pairs, experts))
    return OF_MANY_PAIRS if of_pairs else LARGEST_ERROR


def _float32(
    up: TiledLinear, down: TiledLinear, layer: int, x: jax.Array, logits: jax.Array, ids: np.ndarray
) -> jax.Array:
    """The same layer, expert by expert from dequantised weights."""
    weights = jax.nn.softmax(jnp.take_along_axis(logits, jnp.asarray(ids), axis=1), axis=1)
    x = x.astype(jnp.float32)

    @jax.jit
    def add(y: jax.Array, expert: jax.Array, up: TiledLinear, down: TiledLinear) -> jax.Array:
        a, b = (dequantize(untile(w[layer][expert]), jnp.float32) for w in (up, down))
        gate, value = jnp.split(jnp.matmul(x, a, precision="highest"), 2, axis=-1)
        one = jnp.matmul(jax.nn.silu(gate) * value, b, precision="highest")
        return y + jnp.where(ids == expert, weights, 0.0).sum(1)[:, None] * one

    y = jnp.zeros(x.shape, jnp.float32)
    for expert in np.unique(ids):
        y = add(y, jnp.int32(expert), up, down)
    return y


def backend(implementation: str | None) -> Any:
    """The module whose layer runs under a name; None stands for the device's best."""
    return mosaic if (implementation or default_implementation()) == mosaic.NAME else triton


def _cut(count: int, top_k: int, gate_up: TiledLinear, down: TiledLinear, implementation: str | None) -> list[Any]:
    """How the two products are cut: both as objects, with the rows of a block where there are blocks."""
    from ferrum_kernels.triton_tiles import expert_tiles, few_cuts

    pairs = count * top_k
    parts = backend(implementation) is mosaic and mosaic.rings(pairs, down.num_experts)
    parts = parts or few_cuts(pairs, top_k, down.num_experts, gate_up, down) or expert_tiles(pairs, down.num_experts)
    return [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]


HEADER = (
    "tokens       us (least)    floor  of floor  floors   Marlin  faster  experts   TB/s  TFLOP/s   compile"
    "   MHz    error"
)


def line(row: dict[str, Any]) -> str:
    """A measurement as text."""
    marlin = (
        f"{row['marlin_microseconds']:8.1f} {row['times_faster']:6.2f}x" if row["marlin_microseconds"] else " " * 16
    )
    error = "" if row["relative_error"] is None else f"{row['relative_error']:8.1e}"
    clock = row["clocks"]["sm_mhz"]
    return (
        f"{row['tokens']:6} {row['microseconds']:8.1f} ({row['least_microseconds']:.1f})".ljust(27)
        + f"{row['floor_microseconds']:7.1f} {row['of_floor']:8.0%} {row['times_floor']:7.1f} {marlin} "
        f"{row['live_experts']:8.1f} {row['terabytes_per_second']:6.2f} {row['teraflops']:8.0f} "
        f"{row['compile_seconds']:7.1f} s {'' if clock is None else f'{clock:.0f}':>5} {error:>8}"
    )
