"""The rooms of the house, and which of them may see which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [
    {"errors", "hardware", "cache", "hub", "progress", "schemas", "disk", "outputs"},
    {"child"},
    {"data"},
    {"artifact"},
    {"text"},
    {"compute"},
    {"measure"},
    {"planner"},
    {"embedder"},
    {"fidelity"},
    {"cli", "__main__"},
]
MODULES = sorted((ROOT / "lowmem").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> int:
    return next(number for number, names in enumerate(ROOMS) if module in names)


def path_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=path_id)
def test_a_room_imports_only_itself_and_rooms_above_it(path):
    parts = path.relative_to(ROOT / "lowmem").with_suffix("").parts
    if parts == ("__init__",):
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "lowmem" and rest.split(".")[0] in set().union(*ROOMS):
            assert room(rest.split(".")[0]) <= room(parts[0]), f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=path_id)
def test_torch_stays_in_its_room(path):
    if path.relative_to(ROOT / "lowmem").parts[0] == "compute":
        return
    assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("path", MODULES, ids=path_id)
def test_only_one_file_opens_the_export_house(path):
    opens = {name for name in imports(path) if name.split(".")[0] == "export"}
    assert not opens or path == ROOT / "lowmem" / "cli" / "export.py"


def test_importing_lowmem_loads_neither_torch_nor_onnxruntime():
    code = "import lowmem, sys; print({'torch', 'onnxruntime', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_importing_lowmem_takes_less_than_150_ms_of_a_processor():
    code = "from time import process_time as t; start = t(); import lowmem; print(t() - start)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    seconds = [  # the first writes the bytecode that the others read
        float(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))
        for _ in range(4)
    ]
    assert min(seconds) < 0.15
