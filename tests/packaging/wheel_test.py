"""Builds the sdist, the wheel from that sdist, installs it beside Hugging Face's `kernels`, and uses it elsewhere.

Then does the same with a wheel that was built where no compiler is. Run by `make wheel-test`; needs a C++ compiler, the
extra `dev` and the package index. Takes a few minutes.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUBSET = ["tests/test_generation.py", "tests/kernels/test_gptq_format.py", "tests/kernels/test_cpu_library.py"]
# What is not of the CPU kernels is left to the other steps: the GPU's kernels, and scripts that no wheel has.
WITHOUT_KERNELS = [
    "tests/kernels",
    "tests/golden/test_goldens.py",
    *(f"--ignore-glob=*/kernels/test_{name}.py" for name in ("triton*", "mosaic*", "*bench*", "tune*")),
]

USE = """
import pathlib, sys
import ferrum_jax as fj, ferrum_kernels
from ferrum_kernels import cpu_library
for module in (fj, ferrum_kernels):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__
assert cpu_library.unavailable() is None and cpu_library.PATH.is_relative_to(sys.prefix), cpu_library.unavailable()
model = fj.load("demo")
texts = fj.generate(model, ["Once upon a time"], max_tokens=8, temperature=0.0)
assert len(texts) == 1 and texts[0].strip(), texts
print("fj", fj.__version__, "wrote:", texts[0])
"""

INSTALL = ("-m", "pip", "install", "-qq", "--no-compile")  # most modules are never imported


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


def run(*command: str | Path, cwd: Path, quiet: bool = False, **variables: str) -> str:
    """Output of a command that must succeed; the environment names no source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    pipes = (subprocess.PIPE, subprocess.STDOUT) if quiet else (None, None)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, text=True, stdout=pipes[0], stderr=pipes[1]
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout or ''}\nThis failed with exit code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout or ""


def check(true: bool, sentence: str) -> None:
    if not true:
        sys.exit(sentence)


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    wanted = tracked.stdout.split("\n")[:-1] if tracked.returncode == 0 else []
    missing = [name for name in wanted if (ROOT / name).exists() and name not in packed]
    check(not missing, f"The sdist lacks {missing}")
    check("Makefile" in packed and "tests/conftest.py" in packed, "The sdist lacks the Makefile or the tests.")


def build_requirements() -> list[str]:
    """What pip would bring into its own environment for a build, and what this file builds with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return [*project["build-system"]["requires"], *project["tool"]["scikit-build"]["build"]["requires"], "build"]


def check_wheel(wheel: Path, library: bool) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    name = "ferrum_kernels/libferrum_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
    check((name in packed) == library, f"{wheel.name} {'lacks' if library else 'holds'} {name}.")
    tag = wheel.name.split("-", 2)[2]
    check(tag.startswith("py3-none-") and ("-any." in tag) != library, f"The wheel is called {wheel.name}.")
    packed.discard(name)
    top = {name.split("/")[0] for name in packed if ".dist-info/" not in name}
    check(top == {"ferrum_jax", "ferrum_kernels"}, f"The wheel holds {sorted(top)}, not just the two packages.")
    for package, home in {"ferrum_jax": ROOT, "ferrum_kernels": ROOT / "kernels"}.items():
        files = {
            path.relative_to(home).as_posix()
            for path in (home / package).rglob("*")
            if path.is_file() and path.relative_to(home).as_posix() != name
            if not {"__pycache__", "native"} & set(path.parts)
        }
        held = {name for name in packed if name.startswith(f"{package}/")}
        check(held == files, f"{package} in the wheel and in the source tree differ: {sorted(held ^ files)}")
        check(f"{package}/py.typed" in held, f"The wheel has no {package}/py.typed.")
    check(any(name.endswith("/model.safetensors") for name in packed), "The wheel has no demo model.")
    check(any(name.endswith("licenses/LICENSE") for name in packed), "The wheel has no licence.")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ferrum-jax-wheel-") as name:
        folder = Path(name)
        say("building the sdist, the wheel from it, and a wheel as where no compiler is")
        builder = folder / "builder" / "bin" / "python"
        run(sys.executable, "-m", "venv", folder / "builder", cwd=folder)
        run(builder, *INSTALL, *build_requirements(), "cmake", "ninja", cwd=folder)
        build = (builder, "-m", "build", "--no-isolation")
        path = os.pathsep.join([str(builder.parent), os.environ["PATH"]])
        run(*build, "--outdir", folder, ROOT, cwd=folder, quiet=True, PATH=path, SKBUILD_WHEEL_CMAKE="true")
        (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        run(*build, "--wheel", "--outdir", folder / "pure", ROOT, cwd=folder, quiet=True, PATH=path, CXX="/no/compiler")
        (pure,) = folder.glob("pure/*.whl")
        check_sdist(sdist)
        check_wheel(wheel, library=True)
        check_wheel(pure, library=False)
        say(f"{sdist.name} {sdist.stat().st_size / 1e6:.1f} MB, {wheel.name} {wheel.stat().st_size / 1e6:.1f} MB")

        say("installing the wheel beside Hugging Face's kernels")
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        bin_folder = folder / "venv" / "bin"
        python = bin_folder / "python"
        run(python, *INSTALL, f"{wheel}[test]", "kernels", cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        for place in (folder, ROOT):
            run(python, "-c", "import kernels; kernels.get_kernel", cwd=place)
        run(python, "-c", USE, cwd=folder)
        check("run" in run(bin_folder / "ferrum-jax", "--help", cwd=folder, quiet=True), "--help does not name run.")
        run(bin_folder / "ferrum-jax", "run", "demo", "Once upon a time", "--max-tokens", "16", cwd=folder)

        say("running tests from another folder against the wheel")
        elsewhere = folder / "elsewhere"
        shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", elsewhere)
        run(python, "-m", "pytest", *SUBSET, cwd=elsewhere)

        say("the wheel without the CPU kernels says so, and computes the same")
        run(python, *INSTALL, "--force-reinstall", "--no-deps", pure, cwd=folder)
        said = run(bin_folder / "ferrum-jax", "doctor", cwd=folder, quiet=True)
        check("Install a C++ compiler (" in said and "verdict     ready" in said, said)
        run(python, "-m", "pytest", "-m", "not slow", *WITHOUT_KERNELS, cwd=elsewhere)

        say("uninstalling leaves Hugging Face's kernels whole")
        run(python, "-m", "pip", "uninstall", "-qq", "-y", "ferrum-jax", cwd=folder)
        run(python, "-c", "import kernels; kernels.get_kernel", cwd=folder)
    say("the wheel is good")


if __name__ == "__main__":
    main()
