"""Measure how the GPU kernels are best cut up on this GPU and write their tables: python kernels/bench/tune.py --help.

It covers all of ferrum_kernels/tuned: of the Triton kernels' table "few" and "experts" (expert layers), "rows" (single
products) and "parts" (those cut along their inputs), and on a Hopper GPU with jax 0.11 the table of the Mosaic GPU
kernels. Of "parts" and the Mosaic GPU kernels candidates have been measured on a GPU, but no run of theirs has come to
its end there yet. Single products are cut by rules and by no table where they have up to 16 rows and are not in parts
(triton_rows.cut_for), and on Hopper from 512 rows on (mosaic.matrix_ring).

Candidates are compiled in a pool of threads and then timed one after the other, several matrices in rotation as one
CUDA graph, so that weights come from memory. Every result goes to a log at once: a run that was stopped goes on where
it was, and a run that is short of time (--budget-seconds) says what is left. A candidate whose numbers are wrong is not
chosen. The tables are written when all was measured; commit them beside the others in ferrum_kernels/tuned.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tune_cases as cases_of
import tune_parts
import tune_rings
import tune_tables
from tune_cases import Case

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "ferrum_kernels"
SOURCES = (  # of the kernels that are measured
    *(
        "mosaic_cut",
        "mosaic_few",
        "mosaic_loop",
        "mosaic_matmul",
        "mosaic_registers",
        "mosaic_signals",
        "mosaic_turns",
        "mosaic_warps",
        "triton_call",
        "triton_decode",
    ),
    *("triton_few", "triton_matmul", "triton_norm", "triton_place", "triton_route", "triton_rows", "triton_tiles"),
)


class Log:
    """Results in a file of JSON lines, kept by the kernels' sources: {"source", "key", "microseconds" or "failed"}.

    A last line that was cut off is ignored and measured again. Before a case runs a line says that it has "begun": one
    that began twice without a result has failed, so that a kernel that hangs does not do so for ever.
    """

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        self.results: dict[str, Any] = {}
        text = path.read_text("utf-8") if path.exists() else ""
        begun: collections.Counter[str] = collections.Counter()
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["source"] == source and "begun" in entry:
                begun[entry["key"]] += 1
            elif entry["source"] == source:
                self.results[entry["key"]] = entry.get("microseconds", entry.get("failed"))
        for key in begun.keys() - self.results.keys():
            if begun[key] > 1:
                self.results[key] = "the process ended while this ran, twice"
        self._begin = "\n" if text and not text.endswith("\n") else ""

    def begin(self, case: Case) -> None:
        """Write down that a case is about to run."""
        self._write(case, "begun", True)

    def add(self, case: Case, result: float | str) -> None:
        """Keep a result and write it down."""
        self.results[case.key] = result
        self._write(case, "microseconds" if isinstance(result, float) else "failed", result)

    def _write(self, case: Case, field: str, value: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._begin + json.dumps({"source": self.source, "key": case.key, field: value}) + "\n")
        self._begin = ""


def source_of_kernels() -> str:
    """A name for what is measured: the kernels' sources and the compiler's version."""
    import jaxlib

    text = "".join((KERNELS / f"{name}.py").read_text("utf-8") for name in SOURCES)
    return hashlib.sha256((jaxlib.__version__ + text).encode()).hexdigest()[:12]


def left(cases: Sequence[Case], log: Log) -> list[Case]:
    """Cases that the log has no result of."""
    return [case for case in cases if case.key not in log.results]


def run(
    cases: Sequence[Case],
    log: Log,
    lower: Callable[[Case], Callable[[], Callable[[], float | str]]],
    *,
    seconds: float,
    threads: int,
    report: Callable[[Case, float | str], None],
    answers: Callable[[], bool] = lambda: True,
) -> int:
    """Measure what is left until time is up.

    Args:
      cases: all candidates.
      log: results so far; gets the new ones.
      lower: traces a case and gives the function that compiles it, which gives the one that times it.
      seconds: start no further batch after so many.
      threads: that compile, and a quarter of a batch.
      report: called after each case.
      answers: whether the device still works after a case that failed; if not, this was the last one.

    Returns:
      How many cases are still without a result.
    """
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(threads) as pool:
        todo = left(cases, log)
        while todo and time.monotonic() < end:
            batch, todo = todo[: 4 * threads], todo[4 * threads :]
            # Tracing holds the interpreter, compiling does not. Timing starts when all of that is over, as the host
            # must be free to queue work.
            compiling = [pool.submit(_try, _try(lower, case)) for case in batch]
            for case, timed in zip(batch, [future.result() for future in compiling], strict=True):
                if not isinstance(timed, str):
                    log.begin(case)
                result = _try(timed)
                log.add(case, result)
                report(case, result)
                # Whatever ran after an error that a device does not recover from would fail as well.
                lost = isinstance(result, str) and not isinstance(timed, str) and not answers()
                if lost or time.monotonic() > end:
                    todo = []
                    break
    return len(left(cases, log))


def _try(step: Any, *arguments: Any) -> Any:
    """What a step gives; a text where it, or the step that should have made it, failed: that is a result, too."""
    if isinstance(step, str):
        return step
    try:
        return step(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def timer(options: argparse.Namespace, d: int, f: int, experts: int, top_k: int) -> Callable[[Case], Any]:
    """Lowers a case; see `run`. Times are microseconds per kernel."""
    import gpu_table
    import tune_device

    bench = tune_device.Bench(d, f, experts, top_k, options.layers)

    def lower(case: Case) -> Callable[[], Callable[[], float | str]]:
        program = bench.program(case)
        lowered = program.lower()

        def compile_it() -> Callable[[], float | str]:
            compiled = lowered.compile()

            def timed() -> float | str:
                results = compiled(program.memory(), *program.arguments)
                if (error := program.error(results)) > tune_device.LARGEST_ERROR:
                    return f"relative error {error:.1e}"
                took = gpu_table.times(compiled, results, program.arguments, options.repeats, tune_device.SECONDS)
                return statistics.median(took) * 1e6 / program.kernels

            return timed

        return compile_it

    return lower


def answers() -> bool:
    """Whether the device still computes: after some errors nothing runs any more in this process."""
    import jax.numpy as jnp

    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception as error:
        print(f"The device does not answer any more: {error}", file=sys.stderr)
        return False


def candidates(options: argparse.Namespace, cfg: Any, old: Any, old_rings: Any, loads: Sequence[float]) -> list[Case]:
    """All that is to be measured.

    Args:
      options: the loads, rows and whether only what is near the present tables.
      cfg: a model's configuration.
      old: the present table of the Triton kernels.
      old_rings: that of the Mosaic GPU kernels.
      loads: pairs per expert for which those are measured.
    """
    d, f, experts = sizes_of(cfg)
    cases = cases_of.expert_cases(d, f, experts, options.loads) + cases_of.row_cases(options.rows)
    if options.few:
        cases += cases_of.few_cases(d, f, experts, cfg.top_k, old["few"])
    parts = tune_parts.part_cases(options.parts, old["rows"])
    rings = tune_rings.ring_cases(d, f, experts, loads, old)
    if options.near:
        cases = cases_of.near(cases, old, experts)
        parts = tune_parts.near_parts(parts, old["parts"])
        rings = tune_rings.near_rings(rings, old_rings["experts"], experts)
    return list(dict.fromkeys(cases + parts + rings))  # places and what Triton runs may be there twice


def sizes_of(cfg: Any) -> tuple[int, int, int]:
    """Hidden size, intermediate size of an expert, and experts."""
    return cfg.hidden_size, cfg.moe_intermediate_size or cfg.intermediate_size, cfg.num_experts


def progress(total: int, done: int) -> tuple[Callable[[Case, float | str], None], Callable[[], None]]:
    """A bar where stderr is a terminal and rich is installed, else a line every ten seconds; and what ends it."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        terminal = False
    else:
        terminal = sys.stderr.isatty()
    if terminal:
        console = Console(stderr=True)
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        bar = Progress(*columns, console=console)
        task = bar.add_task("", total=total, completed=done)
        bar.start()
        return lambda case, result: bar.update(task, advance=1, description=f"{case.key} {result}"), bar.stop
    state = {"done": done, "said": time.monotonic()}

    def line(case: Case, result: float | str) -> None:
        state["done"] += 1
        if time.monotonic() - state["said"] > 10:
            state["said"] = time.monotonic()
            print(f"{state['done']} of {total}: {case.key} {result}", file=sys.stderr, flush=True)

    return line, lambda: None


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Numbers separated by commas, in order."""
    return lambda text: sorted({kind(part) for part in text.split(",") if part})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "qwen3-30b-a3b.toml", help="shapes of the experts"
    )
    parser.add_argument(
        "--loads", type=numbers(float), default=list(cases_of.LOADS), help="pairs per expert; empty: none"
    )
    parser.add_argument(
        "--rows", type=numbers(int), default=list(cases_of.ROWS), help="rows of single products; empty: none"
    )
    parser.add_argument(
        "--parts", type=numbers(int), default=list(tune_parts.ROWS), help="rows of products in parts; empty: none"
    )
    parser.add_argument(
        "--rings",
        type=numbers(float),
        default=list(tune_rings.LOADS),
        help="pairs per expert of the Mosaic GPU kernels; empty: none",
    )
    parser.add_argument("--few", default=True, action=argparse.BooleanOptionalAction, help="the kernels for few tokens")
    parser.add_argument("--layers", type=int, default=16, help="matrices, or layers of experts, in rotation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--log", type=Path, default=ROOT / ".cache" / "tune.jsonl", help="results; a later run goes on")
    parser.add_argument("--out", type=Path, default=None, help="instead of the device's file in ferrum_kernels/tuned")
    parser.add_argument("--out-rings", type=Path, default=None, help="the same for the table of the Mosaic GPU kernels")
    parser.add_argument("--near", action="store_true", help="only candidates near the entries of the present table")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, choose, write."""
    options = parse(arguments)
    import jax

    from ferrum_jax.config_file import load_toml_config
    from ferrum_kernels import mosaic, triton, triton_tiles

    # One kernel after the other also in a CUDA graph: those of a program that times them do not need each other. The
    # flags are read when the device is first asked for, and an older compiler would end the process over this one.
    if jax.__version_info__ >= (0, 10, 2):
        flag = "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    cfg = load_toml_config(options.config)
    device, sizes = jax.devices()[0].device_kind, sizes_of(cfg)
    old, old_rings, loads = triton_tiles.table(device), mosaic.table(device), options.rings
    # Without a GPU the candidates can still be listed.
    problem = None if triton.unavailable() else mosaic.unavailable()
    if loads and (problem := problem or tune_rings.refuses(*sizes[:2])):
        print(f"The Mosaic GPU kernels are not measured: {problem}.", file=sys.stderr)
        loads = []
    cases = candidates(options, cfg, old, old_rings, loads)
    log = Log(options.log, source_of_kernels())
    todo = len(left(cases, log))
    if options.dry_run:
        for case in cases:
            print(case.key, log.results.get(case.key, ""))
        print(f"{len(cases)} candidates, {todo} without a result in {options.log}", file=sys.stderr)
        return 0
    if problem := triton.unavailable():
        print(f"error: tiles are measured on the GPU that will use them: {problem}.", file=sys.stderr)
        print("--dry-run lists the candidates anywhere.", file=sys.stderr)
        return 3
    report, finish = progress(len(cases), len(cases) - todo)
    try:
        compile_one = timer(options, *sizes, cfg.top_k)
        how = {"seconds": options.budget_seconds, "threads": options.threads, "report": report}
        todo = run(cases, log, compile_one, **how, answers=answers)
    finally:
        finish()
    table = tune_tables.make_table(options, sizes, cases, log.results, device, old)
    tables = [(options.out or tune_tables.file_of("nvidia", device), table)]
    if loads:
        table = tune_tables.make_rings(options, sizes, cases, log.results, device, old_rings, loads)
        tables.append((options.out_rings or tune_tables.file_of("mosaic", device), table))
    if todo:
        print(f"{todo} of {len(cases)} candidates are not measured yet: run this again.", file=sys.stderr)
    for out, table in tables:
        if todo:
            print(f"{out} is as it was.", file=sys.stderr)
        else:
            out.write_text(cases_of.as_text(table) + "\n", "utf-8")
            print(f"wrote {out}", file=sys.stderr)
        print(json.dumps(table) if options.json else tune_tables.text_of(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
