"""No room imports upwards or sideways, and the library has no side effects at import.

The rule is read from the source files, not from running them, so a forbidden import inside a
function is found as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS: dict[str, int] = {
    "errors": -1,
    "progress": -1,
    "words": -1,
    "_version": -1,
    "checkpoint": 0,
    "subspace": 1,
    "model": 2,
    "audit": 3,
    "diff": 3,
    "repair": 4,
    "lab": 5,
    "report": 5,
    "tune": 5,
    "api": 6,
    "realign_cli": 7,
}
# The package's own face re-exports the top floor and so stands outside of the order.
FACE = Path("realign/__init__.py")


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    name = parts[1]
    return name.removesuffix(".py")


def source_files() -> list[Path]:
    files = [*(ROOT / "realign").rglob("*.py"), *(ROOT / "cli/realign_cli").rglob("*.py")]
    return sorted(file for file in files if file.relative_to(ROOT) != FACE)


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor they lead to"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def room_of_import(module: str) -> str | None:
    first, _, rest = module.partition(".")
    if first == "realign_cli":
        return "realign_cli"
    if first != "realign":
        return None
    return rest.partition(".")[0]


def violations(file: Path, tree: ast.AST) -> list[str]:
    room = room_of(file)
    found: list[str] = []
    for line, module in imported_modules(tree):
        target = room_of_import(module)
        if target is None or target == room:
            continue
        if target == "":
            continue  # `from realign import x`: the second entry of the same node names x
        if target not in FLOORS:
            found.append(f"{file}:{line} imports the public face ({module})")
        elif FLOORS[target] >= FLOORS[room]:
            found.append(f"{file}:{line} ({room}) imports {module}")
    return found


def test_every_room_has_a_floor() -> None:
    assert {room_of(file) for file in source_files()} <= set(FLOORS)


def test_no_room_imports_upwards_or_sideways() -> None:
    found: list[str] = []
    for file in source_files():
        found += violations(file, ast.parse(file.read_text("utf-8")))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "line", "bad"),
    [
        ("subspace/x.py", "from realign.checkpoint.reader import Checkpoint", False),
        ("subspace/x.py", "from realign.model.loading import load_model", True),
        ("subspace/x.py", "def f():\n    import realign.repair.engine", True),
        ("report/x.py", "from realign.lab.family import Family", True),
        ("report/x.py", "from realign.audit.schema import Report", False),
        ("repair/x.py", "from realign import open_checkpoint", True),
        ("errors.py", "from realign.progress import SILENT", True),
    ],
)
def test_the_rule_sees_what_it_must(room: str, line: str, bad: bool) -> None:
    assert bool(violations(ROOT / "realign" / room, ast.parse(line))) is bad


def test_only_the_model_room_imports_auto_classes() -> None:
    for file in source_files():
        if room_of(file) == "model":
            continue
        for line, module in imported_modules(ast.parse(file.read_text("utf-8"))):
            name = module.rpartition(".")[2]
            assert not (module.startswith("transformers") and name.startswith("Auto")), (
                f"{file}:{line} imports {module}; running a model is the business of realign/model"
            )


def test_the_subspace_room_sees_no_files() -> None:
    for file in (ROOT / "realign/subspace").rglob("*.py"):
        for line, module in imported_modules(ast.parse(file.read_text("utf-8"))):
            assert module.partition(".")[0] not in {"pathlib", "os", "safetensors", "io"}, (
                f"{file}:{line} imports {module}"
            )


def test_the_library_never_prints() -> None:
    for file in source_files():
        if room_of(file) == "realign_cli":
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not (is_print and node.func.id == "print"), f"{file}:{node.lineno} prints"


# What may stand at module level: imports, definitions, constants, docstrings, type-checking blocks.
ALLOWED = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.TypeAlias if hasattr(ast, "TypeAlias") else ast.Assign,
)
SIDE_EFFECTS = {"basicConfig", "filterwarnings", "simplefilter", "manual_seed", "set_num_threads"}


def test_no_side_effects_at_module_level() -> None:
    found: list[str] = []
    for file in source_files():
        if room_of(file) == "realign_cli":
            continue
        for node in ast.parse(file.read_text("utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            if not (isinstance(node, ALLOWED) or is_docstring or is_guard):
                found.append(f"{file}:{node.lineno} {type(node).__name__}")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Attribute) and inner.attr in SIDE_EFFECTS:
                        found.append(f"{file}:{inner.lineno} {inner.attr}")
    assert not found, "\n".join(found)


def test_room_packages_hold_only_a_docstring() -> None:
    # `import realign` imports two of them, and must not pull torch in.
    for file in (ROOT / "realign").rglob("__init__.py"):
        if file.relative_to(ROOT) == FACE:
            continue
        body = ast.parse(file.read_text("utf-8")).body
        assert all(
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body
        ), f"{file} does more than describe its room"
