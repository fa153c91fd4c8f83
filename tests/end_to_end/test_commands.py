"""The commands as a user types them: each starts a process of its own."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tuning" / "sft_trainer.py")


def run(arguments: list[str], folder: Path, **environ: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environ
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def options(make_options):
    return make_options("llava15", max_steps=1)


def test_flags_by_path_from_another_folder_with_relative_paths(options, rows, tmp_path):
    relative = {name: os.path.relpath(path, tmp_path) for name, path in options.items() if "/" in str(path)}
    flags = [f"--{name}={value}" for name, value in {**options, **relative}.items()]
    done = run([SCRIPT, *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "Done:" in done.stdout


@pytest.mark.parametrize("command", [["-m", "tuning.sft_trainer"], ["-m", "tuning.cli", "train"]], ids=" ".join)
def test_a_config_file_through_a_module(command, options, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(options))
    done = run([*command, str(tmp_path / "config.json")], ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_config_in_the_environment(options, tmp_path):
    encoded = base64.b64encode(json.dumps(options).encode()).decode()
    done = run([SCRIPT], tmp_path, SFT_TRAINER_CONFIG_JSON_ENV_VAR=encoded)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_wrong_row_is_one_line_that_names_file_row_and_field(options, rows, tmp_path):
    lines = rows.read_text().splitlines()
    lines[9] = lines[9].replace('"role": "assistant"', '"role": "wizard"')  # beyond the rows that are checked first
    wrong = rows.parent / "wrong.jsonl"
    wrong.write_text("\n".join(lines))
    log = tmp_path / "termination.log"
    flags = [f"--{name}={value}" for name, value in {**options, "training_data_path": wrong, "max_steps": 4}.items()]
    done = run([SCRIPT, *flags], tmp_path, TERMINATION_LOG_FILE=str(log))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert errors == [done.stderr.splitlines()[-1]]
    assert f"{wrong}, row 9, field 'messages'" in errors[0]
    assert "wizard" in errors[0]
    assert log.read_text() == errors[0] + "\n"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_unknown_flag_is_one_line_with_the_nearest_real_one(options, tmp_path):
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = run([SCRIPT, *flags, "--learning_rat", "1e-3"], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines() == ["Error: config: learning_rat: unknown option. Did you mean learning_rate?"]
    assert not (tmp_path / "out").exists()
