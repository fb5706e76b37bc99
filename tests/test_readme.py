"""The README's programs run, and the files and functions that it names are there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
LAYOUT = TEXT.partition("## How the code is laid out")[2]


# those that play or train compile at full size, half a minute and more
MARKS = lambda program: [pytest.mark.slow] if re.search(r"make_train\(cfg\),|env\.step", program) else []


@pytest.mark.parametrize("program", [pytest.param(p, id=str(i), marks=MARKS(p)) for i, p in enumerate(PROGRAMS)])
def test_program_runs(program):
    """By itself on one device, compiled without most optimisations."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "\nprint(" not in program


def named_files():
    """Of the tree: each folder's comma-separated names, what is said of them in brackets left out."""
    tree = re.sub(r"\n {8,}", " ", LAYOUT.split("```")[1])  # continued lines
    top = ""
    for line in tree.strip().splitlines():
        names, _, words = line.strip().partition("  ")
        if not line.startswith(" "):
            top = pathlib.Path(names.split()[0])
            yield top
        if not words.strip() and "/" in names and len(names.split()) > 1:
            names, _, words = names.partition(" ")
        yield from (top / name for name in names.split() if line.startswith(" "))
        if names.endswith("/") and top.name != "tests":
            folder = top / names if line.startswith(" ") else top
            words = re.sub(r"\([^()]*\)", "", words).rpartition(":")[2]
            for name in filter(None, re.split(r",\s*|\s+", words.strip())):
                yield folder / (name if name.endswith("/") else f"{name}.py")


def test_files_of_the_tree_exist():
    named = {str(path) for path in named_files()}
    assert {"esper_jax/config.py", "esper_jax/run/job.py", "experiments/cifar.py", "tests"} <= named
    assert not {path for path in named if not (ROOT / path).exists()}
    of = [p.relative_to(ROOT) for p in (ROOT / "esper_jax").rglob("*.py") if p.name != "__init__.py"]
    older = re.search(r"`([\w/.]+)` and `([\w/.]+)` are older names", LAYOUT)
    assert {str(path) for path in of} - named == {f"esper_jax/{name}" for name in (older.groups() if older else ())}


def test_where_it_is_decided():
    """Every `file.py` of the text exists below esper_jax, and the functions behind it are there."""
    rows = [row for row in LAYOUT.splitlines() if row.startswith("| ")]
    found = [
        hit for row in rows for hit in re.findall(r"`([\w/]+\.py)`(?:'s docstring)?(?:: ((?:`\w+`(?:, )?)+))?", row)
    ]
    assert found
    for file, functions in found:
        source = (ROOT / "esper_jax" / file).read_text()
        for name in re.findall(r"\w+", functions):
            assert re.search(rf"\bdef {name}\b|^\s*{name} =", source, re.M), f"{file}: {name}"
