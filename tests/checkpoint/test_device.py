"""Parameters for a device with memory of its own: part by part, in tiles, kept for the next start, never in between."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import environment
from ferrum_jax.checkpoint import device, weight_cache
from ferrum_jax.checkpoint import load as loading
from ferrum_jax.checkpoint.load import CheckpointWarning
from ferrum_jax.errors import BackendError, CapacityError, CheckpointError
from ferrum_jax.kernels import PackedLinear, TiledLinear, is_weight
from ferrum_jax.params import fold_permutations, num_bytes
from ferrum_jax.plan import make_plan
from ferrum_kernels.tiles import tile_all
from tests.support.checkpoint_writer import MIXED_DYNAMIC, TinySpec, write_checkpoint

SPECS = {
    "symmetric": TinySpec(num_experts=4),
    "asymmetric": TinySpec(sym=False, desc_act=True, checkpoint_format="gptq_v2", shards=3),
    "mixed": TinySpec(dynamic={r".*layers\.1\..*experts\.1\.": {"bits": 8}}, lm_head="quantized"),
    "mixtral": TinySpec(family="mixtral", bits=8, old_mixtral_names=True, attention_bias=False),
    "dense": TinySpec(family="qwen3", attention_bias=True, lm_head="tied", dtype="float16"),
    "runs": TinySpec(mlp_only_layers=(0,), num_layers=3, hidden_size=96, vocab_size=101),
}


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is shared with the host, weights are laid out in tiles, transfers are many."""
    monkeypatch.setattr(loading, "shares_memory", lambda: False)
    monkeypatch.setattr(loading, "layout_for", lambda cfg: tile_all)
    monkeypatch.setattr(device, "CHUNK", 2**13)
    monkeypatch.setattr("ferrum_jax.checkpoint.leaves.PIECE", 2**12)
    monkeypatch.setattr(weight_cache, "BLOCK", 4000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(environment.WEIGHT_CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(folder: Path, **arguments: Any) -> fj.Model:
    options: dict[str, Any] = {"weight_cache": False, "quiet": True}
    return fj.load(folder, **(options | arguments))


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_parameters_are_those_of_the_cpu_in_tiles(
    spec: TinySpec, tmp_path: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", spec)
    expected = fold_permutations(tile_all(load(folder, dtype="bfloat16").params))
    request.getfixturevalue("apart")
    cold = load(folder, dtype="bfloat16", weight_cache=True)
    warm = load(folder, dtype="bfloat16", weight_cache=True)
    assert (cold.report.from_cache, warm.report.from_cache) == (False, True)
    assert any(isinstance(node, TiledLinear) for node in jax.tree.leaves(cold.params, is_leaf=is_weight))
    for model in (load(folder, dtype="bfloat16"), cold, warm):
        assert_same(model.params, expected)
        assert model.report.bytes_held == num_bytes(expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_projection_in_fewer_bits_is_sent_in_columns(
    bits: int, tmp_path: Path, cache: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", TinySpec(num_experts=4, num_layers=1, vocab_size=320))
    expected = tile_all(load(folder, lm_head_bits=bits).params)
    request.getfixturevalue("apart")
    sent: list[tuple[int, int]] = []
    real = device._Stacks.put

    def put(self: Any, unit: device.Unit, part: Any, start: int) -> None:
        if isinstance(part, PackedLinear) and unit.layer is None:
            sent.append((start, part.n_per_expert))
        real(self, unit, part, start)

    monkeypatch.setattr(device._Stacks, "put", put)
    assert_same(load(folder, lm_head_bits=bits, weight_cache=True).params, expected)
    assert len(sent) > 1 and sum(n for _, n in sent) == 320 and all(start % 64 == 0 for start, _ in sent)
    assert_same(load(folder, lm_head_bits=bits, weight_cache=True).params, expected)


def test_cpu_and_device_share_one_file(tmp_path: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    folder = write_checkpoint(tmp_path / "tiny", SPECS["symmetric"])
    shared = load(folder, weight_cache=True)
    request.getfixturevalue("apart")
    model = load(folder, weight_cache=True)
    assert model.report.from_cache and model.report.weight_cache == shared.report.weight_cache
    assert_same(model.params, tile_all(shared.params))
    assert len(list(cache.iterdir())) == 1


def test_a_device_without_a_layout_of_its_own(
    tmp_path: Path, cache: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "layout_for", lambda cfg: lambda tree: tree)
    folder = write_checkpoint(tmp_path / "tiny", TinySpec(bits=3, num_experts=4, dynamic=MIXED_DYNAMIC))
    model, again = load(folder, weight_cache=True), load(folder, weight_cache=True)
    monkeypatch.setattr(loading, "shares_memory", lambda: True)
    assert_same(model.params, load(folder).params)
    assert_same(again.params, model.params)


def test_a_flipped_bit_is_noticed_on_the_way_and_the_checkpoint_is_read(
    tmp_path: Path, cache: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CHUNK", 2**20)
    folder = write_checkpoint(tmp_path / "tiny", SPECS["symmetric"])
    plain = load(folder, weight_cache=True)
    file = plain.report.weight_cache
    assert file is not None
    whole = file.read_bytes()
    noticed = 0
    for position in range(11, len(whole), len(whole) // 7):
        content = bytearray(whole)
        content[position] ^= 4
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(load(folder, weight_cache=True).params, plain.params)
        texts = [str(one.message) for one in caught]
        assert all("; the checkpoint is read instead." in text and str(file) in text for text in texts)
        noticed += len(caught)
        file.write_bytes(whole)
    assert noticed > 2  # the others lie in the padding


def test_a_file_that_ends_early_is_named(
    tmp_path: Path, cache: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", SPECS["symmetric"])
    plain = load(folder, weight_cache=True)
    preadv = os.preadv
    short = threading.Event()

    def shrinking(file: int, buffers: Any, offset: int) -> int:
        return 0 if short.is_set() else preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    real = weight_cache.Reader.fill

    def fill(self: Any, unit: Any, host: Any) -> Any:
        short.set()
        return [lambda job=job: (job(), short.clear())[0] for job in real(self, unit, host)]

    monkeypatch.setattr(weight_cache.Reader, "fill", fill)
    with pytest.warns(CheckpointWarning, match=r"\(it is cut short\); the checkpoint is read instead\."):
        with pytest.raises(CheckpointError, match="was cut short while it was read"):
            load(folder, weight_cache=True)
    short.clear()
    monkeypatch.undo()
    assert plain.report.bytes_held > 0


def test_an_error_of_the_device_is_not_taken_for_damage(
    tmp_path: Path, cache: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", SPECS["symmetric"])
    load(folder, weight_cache=True)

    def broken(self: Any, unit: Any, part: Any, start: int) -> None:
        raise ValueError("the device fell off the bus")

    monkeypatch.setattr(device._Stacks, "put", broken)
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match="fell off the bus") as caught:
        load(folder, weight_cache=True)
    assert caught.tb is not None and len(jax.live_arrays()) <= before  # an error that is held holds no weights


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_that_gets_no_name_costs_no_second_load(
    tmp_path: Path, cache: Path, shared: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shared:
        request.getfixturevalue("apart")
    folder = write_checkpoint(tmp_path / "tiny", SPECS["symmetric"])
    plain, loads, filled = load(folder), [], loading._filled

    def counted(*arguments: Any) -> Any:
        loads.append(1)
        return filled(*arguments)

    def refused(*arguments: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(loading, "_filled", counted)
    monkeypatch.setattr(weight_cache.os, "replace", refused)
    with pytest.warns(CheckpointWarning, match=r"cache cannot be written \(Read-only file system\), so the assembled"):
        model = load(folder, weight_cache=True)
    assert (len(loads), model.report.weight_cache, list(cache.iterdir())) == (1, None, [])
    assert_same(model.params, plain.params)


def test_a_disk_that_fills_up_is_a_warning(
    tmp_path: Path, cache: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", SPECS["symmetric"])
    plain = load(folder)
    close = weight_cache.Writer.close

    def full(self: Any, leaf: int, layer: int | None, filled: np.ndarray) -> None:
        if layer == 1:
            raise OSError(28, "No space left on device")
        close(self, leaf, layer, filled)

    monkeypatch.setattr(weight_cache.Writer, "close", full)
    with pytest.warns(
        CheckpointWarning, match=r"cache cannot be written \(No space left on device\), so the assembled"
    ):
        model = load(folder, weight_cache=True)
    assert model.report.weight_cache is None and not list(cache.iterdir())
    assert_same(model.params, plain.params)


def test_what_does_not_fit_the_device_is_refused_before_it_is_touched(
    tmp_path: Path, cache: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", dataclasses.replace(SPECS["symmetric"], hidden_size=128))
    held = load(folder, weight_cache=True).report.bytes_held
    monkeypatch.setattr(loading, "place_all", lambda *arguments: pytest.fail("the device was touched"))
    monkeypatch.setattr(environment, "free_memory", lambda: held + 1000)  # no room to lay out
    for kept in (False, True):  # from the checkpoint, and from the file of the cache
        with pytest.raises(CapacityError, match=r"tiny needs 0\.0 GiB for its parameters and 0\.0 GiB while they are"):
            load(folder, weight_cache=kept)


def test_tiles_count_as_they_will_lie_there(tmp_path: Path, apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(loading, "check_memory", lambda needed, what, working=0: seen.append((needed, working)))
    model = load(write_checkpoint(tmp_path / "tiny", TinySpec(num_experts=4, moe_intermediate_size=32)))
    needed, working = seen[-1]
    assert needed == num_bytes(model.params) and working > 0
    assert needed > num_bytes(make_plan(model.cfg).tree)  # 32 outputs are padded to 64


def test_weights_that_have_no_tiles_are_refused_before_the_device_is_touched(
    tmp_path: Path, apart: None, untouched_device: None
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", TinySpec(bits=3, num_experts=4))
    with pytest.raises(BackendError, match=r'this weight has 3\. Use implementation="xla"'):
        load(folder)


class _Feed:
    """Fills with the number of the unit's first array; keeps count of the bytes that are under way."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()

    def fill(self, unit: device.Unit, host: Any) -> list[device.Job]:
        with self.lock:
            self.now += unit.nbytes
            self.most = max(self.most, self.now)

        def job(array: np.ndarray, value: int) -> None:
            time.sleep(0.002)
            array[...] = value

        value = 10 * unit.node + (0 if unit.layer is None else unit.layer)
        return [lambda a=a: job(a, value % 100) for a in jax.tree.leaves(host)]

    def check(self, unit: device.Unit, host: Any) -> list[device.Job]:
        def done() -> None:
            with self.lock:
                self.now -= unit.nbytes

        return [done]


def plan_of(layers: int = 6) -> Any:
    cfg = fj.load("demo", quiet=True, weight_cache=False).cfg
    return make_plan(dataclasses.replace(cfg, num_layers=layers, moe_layers=(), sliding_windows=()))


def test_the_host_holds_few_units_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, feed = plan_of(layers=24), _Feed()
    units = device.units_of(plan.tree, plan)
    largest = max(unit.nbytes for unit in units)
    monkeypatch.setattr(device, "IN_FLIGHT", largest // 4)  # larger ones go alone
    monkeypatch.setattr(device, "CHUNK", 2**16)
    tracemalloc.start()
    params = device.place_all(plan.tree, units, feed, lambda tree: tree)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest <= feed.most < 1.2 * largest + 2**20
    assert peak < 2 * largest + 2**22 < num_bytes(plan.tree)
    assert_same(
        jax.tree.map(lambda a: jnp.zeros((), a.dtype), params),
        jax.tree.map(lambda a: jnp.zeros((), a.dtype), plan.tree),
    )
    nodes = jax.tree.leaves(params, is_leaf=is_weight)
    for unit in units:
        stack = jax.tree.leaves(nodes[unit.node])[0]
        value = (10 * unit.node + (0 if unit.layer is None else unit.layer)) % 100
        found = np.asarray(stack if unit.layer is None else stack[unit.layer])
        assert (found == np.asarray(value, found.dtype)).all()


def test_the_device_holds_few_chunks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, feed = plan_of(layers=24), _Feed()
    units = device.units_of(plan.tree, plan)
    monkeypatch.setattr(device, "CHUNK", 2**16)
    limit = device.working_bytes(plan.tree, units)
    assert limit == num_bytes(plan.tree["layers"]) // 24 > 2**18
    now = most = 0
    lock = threading.Lock()
    send, place = jax.device_put, device._place

    def put(part: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 2 * num_bytes(part)
            most = max(most, now)
        return send(part)

    def written(stack: Any, part: Any, *arguments: Any) -> Any:
        nonlocal now
        time.sleep(0.001)
        found = place(stack, part, *arguments)
        jax.block_until_ready(found[1])
        with lock:
            now -= 2 * num_bytes(part)
        return found

    monkeypatch.setattr(jax, "device_put", put)
    monkeypatch.setattr(device, "_place", written)
    device.place_all(plan.tree, units, feed, lambda tree: tree)
    assert 2**17 < most <= limit
    monkeypatch.setattr(device, "ON_DEVICE", 1000)
    assert device.working_bytes(plan.tree, units) == 2 * 2**16  # a chunk goes alone


def test_the_first_error_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, feed = plan_of(), _Feed()
    monkeypatch.setattr(device, "UNITS", 1)
    seen: list[int] = []
    real = feed.fill

    def fill(unit: device.Unit, host: Any) -> list[device.Job]:
        seen.append(unit.node)
        if len(seen) == 4:
            raise CheckpointError("damaged")
        return real(unit, host)

    monkeypatch.setattr(feed, "fill", fill)
    units = device.units_of(plan.tree, plan)
    with pytest.raises(CheckpointError, match="damaged"):
        device.place_all(plan.tree, units, feed, lambda tree: tree)
    assert len(seen) < 20 < len(units)


def test_stacks_are_written_in_place() -> None:
    stack = jnp.zeros((3, 4, 8), jnp.float32)
    lowered = device._place.lower(
        stack, np.ones((2, 8), np.float32), np.int32(1), np.int32(2), lambda tree: tree, True
    ).as_text()
    assert "tf.aliasing_output" in lowered
    out, _ = device._place(stack, np.ones((2, 8), np.float32), np.int32(1), np.int32(2), lambda tree: tree, True)
    np.testing.assert_array_equal(np.asarray(out).sum((1, 2)), [0, 16, 0])


@pytest.mark.parametrize(
    ("count", "nbytes", "multiple", "sizes"),
    [
        (128, 207 * 2**20, 1, {16}),  # experts of Qwen3-30B-A3B: a divisor, one program
        (151_936, 622 * 10**6, 1, {4748}),
        (151_936, 316 * 10**6, 64, {16_128, 6784}),  # no divisor near: two programs
        (5, 2**40, 1, {1}),
    ],
)
def test_chunks_are_alike_where_they_can_be(count: int, nbytes: int, multiple: int, sizes: set[int]) -> None:
    cuts = device._cuts(count, nbytes, multiple)
    assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]] and cuts[-1][1] == count
    assert {stop - start for start, stop in cuts} == sizes
    assert all(start % multiple == 0 for start, _ in cuts)
