"""The shape of the repository: what may import what, what ships, and what must never appear."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = [*ROOT.glob("ferrum_jax/**/*.py"), *ROOT.glob("kernels/ferrum_kernels/**/*.py")]

# The landmarks of ferrum_jax, from the ground up. None may reach one of a floor above its own, by whatever helpers.
FLOORS = (
    {"errors"},
    {"buckets", "chat", "config", "kernels", "sampling", "tokenizer"},
    {"cache", "layers", "moe", "pages", "paged", "params", "rope"},
    {"budget", "checkpoint", "model"},
    {"engine_steps", "requests", "steps"},
    {"generation", "nnx", "saving", "schedule"},
    {"engine"},
    {"cli"},
)
FLOOR = {module: height for height, modules in enumerate(FLOORS) for module in modules}

SOURCE_TREE = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, also inside functions; relative imports are spelled out."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Modules and subpackages of ferrum_jax, each with those that it imports; the front door, all lazy, is left out."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.glob("ferrum_jax/**/*.py"):
        module = path.relative_to(ROOT).parts[1].removesuffix(".py")
        used = {parts[1] for parts in (dotted.split(".") for dotted in imports(path)) if parts[0] == "ferrum_jax"}
        graph.setdefault(module, set()).update(used - {module})
    del graph["__init__"]
    return {module: used & graph.keys() for module, used in graph.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    frontier = set(graph[start])
    while frontier:
        found |= frontier
        frontier = {target for module in frontier for target in graph[module]} - found
    return found


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels` of Hugging Face"


def test_both_packages_are_typed() -> None:
    assert (ROOT / "ferrum_jax" / "py.typed").exists()
    assert (ROOT / "kernels" / "ferrum_kernels" / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/ferrum_kernels/**/*.py")), ids=name_of)
def test_kernels_import_jax_and_numpy_only(path: Path) -> None:
    allowed = {"ferrum_kernels", "jax", "jaxlib", "ml_dtypes", "numpy", *sys.stdlib_module_names}
    found = {dotted.split(".")[0] for dotted in imports(path) if not dotted.startswith("kernels.ferrum_kernels")}
    assert found <= allowed


def test_the_library_is_built_for_the_oldest_jaxlib() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (oldest,) = [
        re.match(r"jaxlib>=([\d.]+)", wanted) for wanted in project["project"]["dependencies"] if "jaxlib" in wanted
    ]
    (headers,) = project["tool"]["scikit-build"]["build"]["requires"]
    assert oldest is not None and headers.startswith(f"jaxlib=={oldest[1]};")


def test_python_and_the_library_agree_on_their_interface() -> None:
    source = (ROOT / "kernels/ferrum_kernels/native/ffi.cc").read_text("utf-8")
    loader = (ROOT / "kernels/ferrum_kernels/cpu_library.py").read_text("utf-8")
    (built,) = re.findall(r"int ferrum_cpu_abi\(\) { return (\d+); }", source)
    assert f"\nABI = {built} " in loader


def test_imports_go_one_way() -> None:
    graph = import_graph()
    for module in graph.keys() & FLOOR.keys():
        above = {target for target in reachable(graph, module) & FLOOR.keys() if FLOOR[target] > FLOOR[module]}
        assert not above, f"ferrum_jax.{module} reaches up to {sorted(above)}"


def test_public_names_and_submodules_differ() -> None:
    import ferrum_jax

    submodules = {path.name.removesuffix(".py") for path in (ROOT / "ferrum_jax").iterdir()}
    assert set(ferrum_jax._HOME).isdisjoint(submodules)


def test_public_names_are_declared_to_type_checkers() -> None:
    import ferrum_jax

    tree = ast.parse((ROOT / "ferrum_jax" / "__init__.py").read_text("utf-8"))
    declared = {
        alias.asname: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == ferrum_jax._HOME | dict.fromkeys(ferrum_jax._SUBMODULES, "ferrum_jax")


def test_every_public_name_exists() -> None:
    import ferrum_jax

    for name in [*ferrum_jax._HOME, *ferrum_jax._SUBMODULES, "__version__"]:
        assert getattr(ferrum_jax, name) is not None
        assert name in dir(ferrum_jax)


def test_unknown_public_name_is_refused() -> None:
    import ferrum_jax

    with pytest.raises(AttributeError, match="module 'ferrum_jax' has no attribute 'forwards'"):
        ferrum_jax.forwards  # noqa: B018


def test_functions_stay_functions_after_submodules_are_imported() -> None:
    code = (
        "import ferrum_jax as fj, ferrum_jax.generation, ferrum_jax.moe, ferrum_jax.checkpoint.load;"
        "assert all(callable(f) for f in (fj.load, fj.generate, fj.sample, fj.dispatch, fj.layer))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=SOURCE_TREE)


@pytest.mark.parametrize("path", sorted(PRODUCT), ids=name_of)
def test_product_imports_no_other_framework(path: Path) -> None:
    assert {dotted.split(".")[0] for dotted in imports(path)}.isdisjoint({"tensorflow", "torch", "transformers"})


@pytest.mark.parametrize("path", sorted(PRODUCT), ids=name_of)
def test_only_the_commands_print(path: Path) -> None:
    if (ROOT / "ferrum_jax" / "cli") in path.parents:
        return
    names = [node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)]
    assert "print" not in names


@pytest.mark.parametrize(
    "statement",
    ["import ferrum_jax", "import ferrum_jax.errors", "import ferrum_jax.cli", "import ferrum_kernels.cpu_library"],
)
def test_import_is_light(statement: str) -> None:
    code = f"{statement}; import sys; print(*sorted({{'flax', 'jax', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=SOURCE_TREE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"`{statement}` imports {done.stdout}"


@pytest.mark.parametrize("path", sorted({*PRODUCT, *ROOT.glob("[kt]e*/**/*.py")}), ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_tools_are_pinned_once() -> None:
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["dev"]
    pinned = {requirement for requirement in dev if requirement.startswith("ruff==")}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == pinned
