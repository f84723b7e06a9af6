"""The notebooks run from top to bottom as plain scripts, say what they should, and are paired with their .ipynb."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(script: Path) -> list[tuple[str, str]]:
    """(kind, text) of each cell of a py:percent script; the header before the first mark is not a cell."""
    found = re.split(r"^# %%(.*)\n", script.read_text("utf-8"), flags=re.MULTILINE)[1:]
    pairs = [
        ("markdown" if "markdown" in mark else "code", text.strip())
        for mark, text in zip(found[::2], found[1::2], strict=True)
    ]
    return [(kind, re.sub("^# ?", "", text, flags=re.M) if kind == "markdown" else text) for kind, text in pairs]


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [float(group) for group in found.groups()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_ipynb_holds_the_cells_of_the_script(script: Path) -> None:
    notebook = json.loads(script.with_suffix(".ipynb").read_text("utf-8"))
    paired = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert paired == cells(script), f"pair them again: jupytext --to ipynb {script.name}"
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs are not kept"


@pytest.mark.slow
def test_anatomy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "MPLBACKEND": "Agg", "FIGURES": str(tmp_path)}
    command = [sys.executable, "-W", "error", str(ROOT / "notebooks" / "anatomy.py")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.match(r"device: .+\nferrum_jax .+\njax [\d.]+\n", out)
    assert "same as fj.dequantize: True" in out
    assert "same as the whole model: True" in out
    slope, gradient = numbers(r"finite difference (\S+), by jax.grad (\S+)", out)
    assert slope == pytest.approx(gradient, rel=0.02)
    before, after = numbers(r"P\(wolf\) (\S+) -> (\S+)", out)
    assert after > 10 * before
    intact, ablated = re.findall(r"^  (The king had three sons.+)$", out, re.MULTILINE)
    assert intact != ablated
    figures = {file.name: file.stat().st_size for file in tmp_path.glob("*.png")}
    assert figures.keys() == {"expert.png", "routing.png", "ablation.png", "gradient.png"}
    assert min(figures.values()) > 10_000
