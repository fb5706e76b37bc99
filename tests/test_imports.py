"""Who may import whom, read off the source."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("esper_jax", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
ORDER = ("data", "network", "lifecycle", "env", "control", "train", "run")  # each of what stands before it, and itself
BESIDE = {  # stand in the order next to each other, but know nothing of each other
    "network": ("data",),
    "lifecycle": ("data", "network"),
}
UPWARD = {  # what is allowed against the order: how work is spread over devices
    "train": {f"esper_jax.run.devices{name}" for name in ("", ".REPLICATED", ".SHARDED")},
}


def imported(module):
    """Full names of what a module imports, anywhere in it."""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            of = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{of}.{alias.name}" for alias in node.names)


def part(name):
    """The folder or file of `esper_jax` that a name belongs to; None outside."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "esper_jax" else None


def users(library):
    return {module for module in FILES for name in imported(module) if name.partition(".")[0] == library}


def test_the_configuration_knows_names_and_modules_alone():
    """What it imports must not import it."""
    allowed = {"enums", "types", "network"}
    for module in ("esper_jax.config", "esper_jax.network.blueprints", "esper_jax.network.layers"):
        found = {part(name) for name in imported(module)} - {None}
        assert found <= allowed and (module == "esper_jax.config" or "config" not in found)


@pytest.mark.parametrize("folder", ORDER)
def test_imports_follow_the_order(folder):
    own = [module for module in FILES if part(module) == folder]
    assert own
    forbidden = {*ORDER[ORDER.index(folder) + 1 :], *BESIDE.get(folder, ()), "evidence"}
    if folder == "run":
        forbidden.remove("evidence")  # writes the report
    for module in own:
        found = {name for name in imported(module) if part(name) in forbidden}
        assert found <= UPWARD.get(folder, set()), module


def test_nobody_asks_which_host_it_is():
    """What is shared by all hosts knows the interface alone."""
    hosts = {"cnn", "transformer", "layers", "sequences"}
    for module in FILES:
        if part(module) in ("lifecycle", "env", "control", "train") or module == "esper_jax.network.blend":
            found = {name.removeprefix("esper_jax.network.").partition(".")[0] for name in imported(module)}
            assert not found & hosts, module


def test_evidence_reads_files_only():
    own = [module for module in FILES if part(module) == "evidence"]
    assert own
    for module in own:
        names = set(imported(module))
        assert not {name for name in names if name.partition(".")[0] in ("jax", "jaxlib", "flax", "chex")}, module
        assert {part(name) for name in names} <= {None, "enums", "evidence", "metric"}, module


def test_evidence_needs_no_jax():
    parts = ("statistics", "tables", "figures", "report")
    code = "".join(f"import esper_jax.evidence.{name}\n" for name in parts) + "import sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_two_libraries_have_one_user_each():
    assert users("orbax") == {"esper_jax.run.checkpoint"}
    assert users("torch") == {"experiments.throughput.torch_loop"}
