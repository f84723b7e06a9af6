"""Every code block of README.md: Python is run, shell commands are checked to exist."""

import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
FENCE = re.compile(r"^ *```([\w-]+)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[tuple[int, str]]:
    """(line of the README that the block starts on, its text)"""
    return [(README[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(README) if m[1] in languages]


def commands() -> list[str]:
    """Single commands of the shell blocks, without prompts and comments."""
    lines = [
        line.removeprefix("$ ")
        for _, text in blocks("bash", "console", "sh", "shell")
        for line in text.replace("\\\n", " ").splitlines()
    ]
    parts = [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line)]
    return [shlex.join(words) for words in parts if words]


@functools.cache
def help_of(*command: str) -> str:
    code = "import sys; from ferrum_jax.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for argument in arguments:
        name, assigned, _ = argument.partition("=")
        pattern = rf"^(ifndef )?{name}( [?:]?=|$)" if assigned else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"


def check_ferrum_jax(arguments: list[str]) -> None:
    subcommand = [argument for argument in arguments[:1] if not argument.startswith("-")]
    text = help_of(*subcommand)
    for option in [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]:
        assert option in text, f"ferrum-jax {' '.join(subcommand)} has no {option}"


def check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        wanted = re.fullmatch(r"(?:ferrum-jax|\.)(?:\[([\w,]+)\])?", argument)
        assert wanted or argument == "-e", f"the README installs {argument}"
        extras = wanted[1].split(",") if wanted and wanted[1] else []
        assert set(extras) <= set(project["optional-dependencies"])


def check_cd(arguments: list[str]) -> None:
    assert len(arguments) == 1


CHECKS = {"make": check_make, "ferrum-jax": check_ferrum_jax, "pip": check_pip, "cd": check_cd}


def test_readme_python_runs(tmp_path: Path) -> None:
    """All blocks are one program, run in an empty folder; its line numbers are those of the README."""
    program = ""
    for line, text in blocks("python"):
        program += "\n" * (line - program.count("\n")) + text
    assert program
    script = tmp_path / "README.py"
    script.write_text(program, "utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands())
def test_readme_command_exists(command: str) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a variable set for one command
        words = words[1:]
    assert words[0] in CHECKS, f"no check here knows the command {words[0]}"
    CHECKS[words[0]](words[1:])


def test_readme_first_commands_are_demo_and_test() -> None:
    assert commands()[:2] == ["make demo", "make test"]
