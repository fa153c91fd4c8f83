"""The names of the files in output_dir, and how to write one so that its readers never see half of it."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tuning.errors import UserError, first_line

# Files of a run in its output_dir.
LOG_FILE = "training_logs.jsonl"  # a line of figures for every logging step and every evaluation
SKIPPED_FILE = "skipped_rows.jsonl"  # the rows that were not trained, and why
SAMPLES_FILE = "sample_predictions.jsonl"  # answers to a few rows before, during and after training
REPORT_FILE = "report.html"  # the page of the run, while it trains and afterwards
CARD_FILE = "README.md"  # the model card
CONFIG_FILE = "resolved_config.json"  # every option of the run
RUN_INFO_FILE = "run_facts.json"  # model, data, parts and machine, known before the first step
PROGRESS_FILE = "run_progress.json"  # how far the run is, and how it ended
RUNS_FILE = "tracker_runs.json"  # for each tracker the id of this run there
COMPLETE_FILE = ".complete"  # the fingerprint of a run whose model is saved
LOCK_FILE = ".lock"  # locked while a run is at work

# Files of a checkpoint, besides the model's.
FINGERPRINT_FILE = "run_identity.json"  # what must stay the same for the run to be resumed
STATE_FILE = "trainer_state.json"  # step, log and callbacks; written last: without it a checkpoint is not complete
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
RANDOM_FILE = "random_states.pt"  # of every process
SCALER_FILE = "scaler.pt"  # of the gradient scaler of fp16
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # folders that accelerate writes
NOT_OF_A_MODEL = (STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE, SCALER_FILE)


def read_user_text(path: str, *, where: str, what: str = "", fix: str = "") -> str:
    """The text of a file that the user named, in UTF-8. Raises `UserError` if it cannot be read, or is none.

    `where`, `what`, `fix`: see `UserError`; `what` is the subject of the problem, such as "the config file".
    """
    subject = f"{what} " if what else ""
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{subject}is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}."
        raise UserError(where=where, problem=problem, fix="Save it as UTF-8.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(where=where, problem=f"{subject}cannot be read: {reason}.", fix=fix) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if the file is missing or holds only a part of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: not JSON, or not text
        return None


def write_json(path: Path, value: Any) -> None:
    """Write as JSON, so that a reader sees the old or the new file, never half of one."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write so that a reader sees the old or the new file, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character of a row is no text
    os.replace(temporary, path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, which may be missing. A half-written line is left out."""
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
    """Whether `name` can only be a path: a hub id is `owner/name` or `name`."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def hide_paths(value: Any) -> Any:
    """An option's value for others to see: of a local path only the last name, of anything else all."""
    if isinstance(value, dict):
        return {key: hide_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_paths(entry) for entry in value]
    if not isinstance(value, str) or "://" in value or "{" in value:  # an address, a template
        return value
    return Path(value).name if is_local_path(value) else value
