"""The files in output_dir that several rooms know, and how to write one so that its readers always see it whole."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

LOG_FILE, SKIPPED_FILE, COMPLETE_FILE = "training_logs.jsonl", "skipped_rows.jsonl", ".complete"
CONFIG_FILE, FACTS_FILE, PROGRESS_FILE = "resolved_config.json", "run_facts.json", "run_progress.json"
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
