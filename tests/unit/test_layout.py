"""The rooms of the package: which may import which, and how large a file or a function may be."""

import ast
import sys
from pathlib import Path

import pytest

import tuning

PACKAGE = Path(tuning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
USED_PACKAGES = {
    "accelerate",
    "datasets",
    "evaluate",
    "httpx",
    "jinja2",
    "numpy",
    "openai",
    "peft",
    "PIL",
    "psutil",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}

# From the lowest layer to the highest. A file may import from its own room and from layers below it, never from
# another room of its layer.
LAYERS = [
    ("errors", "console", "files", "machine", "boxes"),
    ("exit_codes", "metrics"),
    ("config",),
    ("data", "hub"),
    ("distributed",),
    ("model",),
    ("export", "checking", "serving"),
    ("pages",),
    ("training",),
    ("sft_trainer",),
    ("__init__",),
    ("commands",),
    ("demo",),
    ("cli",),
    ("predict",),  # the command by path
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LARGEST_FILE, LONGEST_FUNCTION = 400, 60


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts if len(parts) == 2 else parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room that `tuning.room.file` lies in; `__init__` for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Every module of this package that `file` imports, also inside functions and as `from tuning.room import file`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "tuning"}


def test_no_module_hides_another_package_when_run_by_path():
    # `python tuning/sft_trainer.py` puts the folder tuning first on the module path.
    names = {entry.stem for entry in PACKAGE.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()}
    assert "sft_trainer" in names
    assert not (names - {"__init__"}) & (set(sys.stdlib_module_names) | USED_PACKAGES)


def test_every_room_has_a_layer():
    assert {room_of(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards_only(module):
    room = room_of(module)
    wrong = [
        name
        for name in imports_of(MODULES[module])
        if room_of(name) != room
        and (LEVEL[room_of(name)] > LEVEL[room] or (LEVEL[room_of(name)] == LEVEL[room] and LEVEL[room] > 0))
    ]
    assert not wrong


def test_data_and_model_never_import_each_other():
    assert not [name for file in (PACKAGE / "model").glob("*.py") for name in imports_of(file) if "tuning.data" in name]


def test_no_two_files_import_each_other():
    imports = {module: imports_of(file) for module, file in MODULES.items()}
    pairs = {(a, b) for a, names in imports.items() for b in names if a < b and a in imports.get(b, ())}
    assert not pairs


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module):
    text = MODULES[module].read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION}
    assert not long
    assert len(text.splitlines()) < LARGEST_FILE


def test_few_files_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    assert len((PACKAGE / "sft_trainer.py").read_text(encoding="utf-8").splitlines()) <= 150
