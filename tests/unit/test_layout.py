import ast
import sys
from pathlib import Path

import pytest

import tuning

PACKAGE = Path(tuning.__file__).parent
USED_PACKAGES = {
    "accelerate",
    "datasets",
    "evaluate",
    "jinja2",
    "numpy",
    "peft",
    "PIL",
    "tokenizers",
    "torch",
    "transformers",
}


def top_level_names() -> set[str]:
    return {entry.stem for entry in PACKAGE.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()}


def imports_of(file: Path) -> set[str]:
    """Every module of this package that `file` imports, at any depth, also as `from tuning import x`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "tuning"}


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_no_module_hides_another_package_when_run_by_path():
    # `python tuning/sft_trainer.py` puts the folder tuning first on the module path.
    names = top_level_names()
    assert "sft_trainer" in names
    assert not (names - {"__init__"}) & (set(sys.stdlib_module_names) | USED_PACKAGES)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("data", ("tuning.model", "tuning.training", "tuning.config", "tuning.sft_trainer")),
        ("model", ("tuning.data", "tuning.training", "tuning.sft_trainer")),
        ("training", ("tuning.sft_trainer", "tuning.demo")),
    ],
)
def test_imports_go_one_way(folder, forbidden):
    files = sorted((PACKAGE / folder).glob("*.py"))
    assert len(files) > 1
    wrong = {file.name: [name for name in imports_of(file) if within(name, forbidden)] for file in files}
    assert not {name: imports for name, imports in wrong.items() if imports}


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("config/*.py", ("tuning.errors", "tuning.config")),
        ("report/*.py", ("tuning.config", "tuning.console", "tuning.files", "tuning.page", "tuning.report")),
        *((part, ()) for part in ("errors.py", "console.py", "files.py", "page/*.py")),
    ],
)
def test_base_modules_import_only_what_is_below_them(part, allowed):
    files = sorted(PACKAGE.glob(part))
    assert files
    for file in files:
        assert not [name for name in imports_of(file) if not within(name, allowed)], file.name
