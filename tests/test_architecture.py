"""The rooms of the package import one way only, and importing it is cheap and silent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import blackmamba

ROOT = Path(blackmamba.__file__).parent

# From top to bottom. A room may import rooms of the layers below its own, never beside or above.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"analyse"},
    {"evaluate"},
    {"train", "generate"},
    {"checkpoint"},
    {"data", "model"},
    {"ops"},
    {"presets", "recipes"},
    {"config", "files"},
    {"errors", "version"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("blackmamba.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported_rooms(path) - {room}:
        assert LEVEL[room] < LEVEL[other], f"{room} imports {other}"


def test_config_imports_the_standard_library_only():
    tree = ast.parse((ROOT / "config.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top == "blackmamba" or top in sys.stdlib_module_names, name


def test_import_is_silent_and_loads_nothing_heavy():
    code = (
        "import sys, blackmamba\n"
        "heavy = {'triton', 'transformers', 'matplotlib', 'tensorboard', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""
