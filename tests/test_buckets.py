"""Buckets hold what they say, and a step compiles once per bucket or names the argument that would make it compile."""

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_jax.buckets import BucketedStep, Buckets, compile_together
from ferrum_jax.errors import CapacityError, ConfigError, RetraceError


@given(size=st.integers(1, 512))
def test_fit_is_the_smallest_bucket_that_holds(size: int) -> None:
    ladder = Buckets().widths()
    fitted = Buckets().fit("prefill", size)
    assert fitted >= size
    assert all(other < size for other in ladder if other < fitted)


@pytest.mark.parametrize(("backend", "last"), [("cpu", 512), ("METAL", 512), ("gpu", 4096)])
def test_prefill_ladder_wastes_at_most_half_an_octave(backend: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    ladder = Buckets().widths()
    assert ladder[:5] == (16, 24, 32, 48, 64) and ladder[-1] == last
    assert all(b / a <= 1.5 for a, b in itertools.pairwise(ladder))
    assert Buckets(prefill=(7, 9)).widths() == (7, 9)


@given(rows=st.integers(1, 2**16), ladder=st.sampled_from([None, (8,), (16, 100, 5000)]))
def test_rows_together_read_at_most_so_many_tokens(rows: int, ladder: tuple[int, ...] | None) -> None:
    buckets = Buckets(prefill=ladder)
    widest, widths = buckets.widest(rows), buckets.widths()
    assert rows * widest <= 2**14 or widest == widths[0]
    assert all(rows * width > 2**14 for width in widths if width > widest)


def test_nothing_fits_beyond_the_largest() -> None:
    with pytest.raises(CapacityError, match=r"batch size 257 is beyond the largest bucket, 256; extend Buckets\.batch"):
        Buckets().fit("batch", 257)


def test_a_dispatch_is_one_step_unless_it_is_a_gpu_s_or_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Buckets(steps=(2, 4)).steps_of_dispatch() == (2, 4)
    for backend, ladder in (("cpu", (1,)), ("METAL", (1,)), ("gpu", (1, 8))):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert Buckets().steps_of_dispatch() == ladder
    with pytest.raises(ConfigError, match=r"Buckets\.steps is \(4, 1\); it must hold at least one size"):
        Buckets(steps=(4, 1))


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 2), (4, 1)])
def test_a_ladder_must_rise(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Buckets\.cache is .*; it must hold at least one size, all positive and"):
        Buckets(cache=sizes)


def test_buckets_are_frozen_and_hashable() -> None:
    assert hash(Buckets()) == hash(Buckets())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Buckets().batch = (1,)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_bucket_compiles_once_and_is_recorded() -> None:
    traces = []

    def double(x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return x * 2

    step = BucketedStep("double", double)
    for size in (2, 2, 4, 2, 4):
        assert step(size, x=jnp.ones(size)).tolist() == [2.0] * size
    assert traces == [(2,), (4,)]
    assert [(record.step, record.bucket) for record in step.records] == [("double", 2), ("double", 4)]
    assert all(record.seconds > 0 for record in step.records)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (jnp.ones(9, jnp.int32), r"argument 'x' changed int32\[8\] -> int32\[9\]\. Pad it"),
        (jnp.ones(8, jnp.float32), r"argument 'x' changed int32\[8\] -> float32\[8\]\. Pad it"),
        ({"inner": jnp.ones(8, jnp.int32)}, r"argument 'x' has another structure\. Use a key of its own"),
    ],
)
def test_other_shapes_are_refused_by_name(x: object, found: str) -> None:
    step = BucketedStep("decode", lambda scale, x: jax.tree.map(lambda leaf: leaf * scale, x))
    step("b8", scale=jnp.int32(2), x=jnp.ones(8, jnp.int32))
    with pytest.raises(RetraceError, match=f"decode was compiled for bucket b8 and would compile again: {found}"):
        step("b8", scale=jnp.int32(2), x=x)
    assert len(step.records) == 1


def test_a_missing_argument_is_a_difference() -> None:
    step = BucketedStep("add", lambda x, y=None: x if y is None else x + y)
    step(1, x=jnp.ones(2))
    with pytest.raises(RetraceError, match="argument 'y' has another structure"):
        step(1, x=jnp.ones(2), y=jnp.ones(2))


def test_donated_buffers_are_reused() -> None:
    step = BucketedStep("fill", lambda cache: cache.at[0].set(1.0), donate=("cache",))
    cache = jnp.zeros((64, 64))
    out = step(1, cache=cache)
    assert cache.is_deleted() and float(out[0, 0]) == 1.0


def test_programs_that_compile_together_are_those_that_would_compile_alone() -> None:
    step = BucketedStep("double", lambda x: x * 2)
    assert step(2, x=jnp.ones(2)).tolist() == [2.0] * 2
    shapes = {size: jax.ShapeDtypeStruct((size,), jnp.float32) for size in (2, 3, 4)}
    compile_together((step.trace(size, x=shape) for size, shape in shapes.items()), threads=2)
    assert {record.bucket for record in step.records} == {2, 3, 4} and len(step.records) == 3  # the first of them once
    for size in shapes:
        assert step(size, x=jnp.ones(size)).tolist() == [2.0] * size
    assert len(step.records) == 3
    with pytest.raises(RetraceError, match=r"argument 'x' changed float32\[3\] -> float32\[4\]"):
        step(3, x=jnp.ones(4))


def test_the_next_program_is_traced_while_the_last_one_compiles() -> None:
    """The first job ends only when the second has been asked for: one after the other would wait for ever."""
    asked = threading.Event()

    def jobs() -> Iterator[Callable[[], None]]:
        yield lambda: ends.append(asked.wait(timeout=60))
        asked.set()
        yield lambda: ends.append(True)

    ends: list[bool] = []
    compile_together(jobs())
    assert ends == [True, True]


def test_a_program_that_does_not_compile_is_heard_of() -> None:
    def broken() -> None:
        raise ValueError("no such instruction")

    with pytest.raises(ValueError, match="no such instruction"):
        compile_together([broken])


def test_after_a_program_that_does_not_compile_no_more_are_traced() -> None:
    asked = []

    def broken() -> None:
        raise ValueError("no such instruction")

    def jobs() -> Iterator[Callable[[], None]]:
        for number in range(200):
            asked.append(number)
            yield broken
            time.sleep(0.01)

    with pytest.raises(ValueError, match="no such instruction"):
        compile_together(jobs())
    assert len(asked) < 200


def test_after_an_interrupt_nothing_begins_to_compile() -> None:
    began, compiled = threading.Event(), []

    def slow() -> None:
        began.set()
        time.sleep(0.2)

    def jobs() -> Iterator[Callable[[], None]]:
        yield slow
        yield lambda: compiled.append(1)
        assert began.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_together(jobs(), threads=1)
    assert not compiled


def test_no_garbage_is_looked_for_while_programs_are_traced_one_after_the_other() -> None:
    seen = []

    def jobs() -> Iterator[Callable[[], None]]:
        for _ in range(2):
            seen.append(gc.isenabled())
            yield lambda: None

    compile_together(jobs())
    assert seen == [False, False] and gc.isenabled()


def test_garbage_is_collected_again_after_a_trace_that_fails() -> None:
    seen = []

    def broken(x: jax.Array) -> jax.Array:
        seen.append(gc.isenabled())
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        BucketedStep("broken", broken)(1, x=jnp.ones(2))
    assert seen == [False] and gc.isenabled()
