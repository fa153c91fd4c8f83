"""The files in output_dir that several rooms know, and how to write one so that its readers always see it whole."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

LOG_FILE, SKIPPED_FILE, COMPLETE_FILE = "training_logs.jsonl", "skipped_rows.jsonl", ".complete"
CONFIG_FILE, RUN_INFO_FILE, PROGRESS_FILE = "resolved_config.json", "run_facts.json", "run_progress.json"
SAMPLES_FILE, REPORT_FILE, CARD_FILE = "sample_predictions.jsonl", "report.html", "README.md"


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no whole one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of what is no JSON, or no text
        return None


def write_json(path: Path, value: Any) -> None:
    """Write as JSON, in one piece like `write_text`."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write so that a reader sees the old or the new file, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, which need not be there; a line half written by a killed process is not."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict):
                yield line


def to_lines(values: Iterable[Mapping[str, Any]]) -> str:
    """Objects as JSON lines."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def is_local_path(name: str) -> bool:
    """Whether `name` can only mean a place on this machine: a hub id is `owner/name` or `name`."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def hide_paths(value: Any) -> Any:
    """A value of an option as others may see it: of a path on this machine only the last name is left."""
    if isinstance(value, dict):
        return {key: hide_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_paths(entry) for entry in value]
    if not isinstance(value, str) or "://" in value or "{" in value:  # an address, a template
        return value
    return Path(value).name if is_local_path(value) else value


FINGERPRINT_FILE = "run_identity.json"
STATE_FILE = "trainer_state.json"  # without it a checkpoint is not complete
OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE = "optimizer.pt", "scheduler.pt", "random_states.pt"
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # folders that accelerate writes
NOT_OF_A_MODEL = (STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE, "scaler.pt")

RUNS_FILE = "tracker_runs.json"  # tracker → the id of this run there
