"""The oldest transformers that pyproject.toml allows passes the quick tests of this folder, as the newest does."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_oldest_transformers_trains_what_people_tune(tmp_path):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = next(re.match(r"transformers>=([\d.]+)", line)[1] for line in wanted if line.startswith("transformers>"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, f"transformers=={oldest}.0"], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.check_output(version, env=environment, text=True).strip() == f"{oldest}.0"
    tests = [sys.executable, "-m", "pytest", "tests/architectures", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
