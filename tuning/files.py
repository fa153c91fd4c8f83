"""The files in output_dir that several rooms know, and how to write one so that its readers always see it whole."""

import json
import os
from pathlib import Path
from typing import Any

LOG_FILE, SKIPPED_FILE, COMPLETE_FILE = "training_logs.jsonl", "skipped_rows.jsonl", ".complete"
CONFIG_FILE, FACTS_FILE, PROGRESS_FILE = "resolved_config.json", "run_facts.json", "run_progress.json"
SAMPLES_FILE, REPORT_FILE = "sample_predictions.jsonl", "report.html"


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
