"""The answers of `vlm-tuning predict` on the disk: written as they come, and kept for the next run."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuning.errors import UserError, writing
from tuning.files import (
    CONFIG_FILE,
    PROGRESS_FILE,
    RUN_INFO_FILE,
    RUNS_FILE,
    STATE_FILE,
    read_json,
    read_lines,
    to_lines,
    write_text,
)

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
OF_A_RUN = (CONFIG_FILE, RUN_INFO_FILE, PROGRESS_FILE, STATE_FILE, RUNS_FILE)
Line = dict[str, Any]
"""`index`, `file`, `row`, and `question`, `reference`, `references` and `prediction`, or `error`.

`prompt`, if a model here has answered: a server does not show it. `boxes` of a row that has some: see `BoxOnImage`.
"""


class Answers:
    """The lines of one model by index.

    Until all are there they are in `.OUTPUT.KEY.partial`, where KEY is a hash of `fingerprint`. Then they are in
    `output`, in the field that the file of scores names for the key. `overwrite`: read none of them.
    """

    def __init__(self, fingerprint: Mapping[str, Any], output: Path, *, overwrite: bool):
        same = json.dumps(fingerprint, sort_keys=True, default=str)
        self.key = hashlib.sha256(same.encode()).hexdigest()[:12]
        self.path = output.with_name(f".{output.name}.{self.key}.partial")
        lines = [] if overwrite else [*self._of_finished_run(output), *read_lines(self.path)]
        self.by_row: dict[int, Line] = {line["index"]: line for line in lines}
        self._is_new = True

    def _of_finished_run(self, output: Path) -> list[Line]:
        field = ((read_json(scores_file(output)) or {}).get("keys") or {}).get(self.key)
        lines = list(read_lines(output)) if field else []
        return [line | {"prediction": line[field]} if field in line else line for line in lines]

    def check_writable(self) -> None:
        """Raise `UserError` if lines could not be written."""
        self.add(())
        if not self.by_row:
            self.path.unlink()

    def add(self, lines: Iterable[Line]) -> None:
        """Write more lines to the disk at once. Raises `UserError` if that fails."""
        new = {line["index"]: line for line in lines}
        self.by_row |= new
        with writing(self.path):
            if self._is_new:  # the last line of an interrupted run may be cut off
                write_text(self.path, to_lines(self.by_row.values()))
            else:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(to_lines(new.values()))
        self._is_new = False


def describe_weights(name: str) -> list[list]:
    """The local files of a model and its processor, and of the base of an adapter, with sizes and times."""
    folder = Path(name).expanduser()
    files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES) if folder.is_dir() else []
    own = describe_files(file for file in files if file.name not in OF_A_RUN)
    base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    return [*own, *(describe_weights(base) if base and base != name else [])]


def describe_files(files: Iterable[Path]) -> list[list]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def scores_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.scores.json")


def check_output(output: Path, keys: set[str], *, overwrite: bool) -> None:
    """Raise `UserError` if the output exists and holds something else than answers with one of `keys`."""
    if not output.exists():
        return
    summary = read_json(scores_file(output)) or {}
    if not summary.get("keys"):
        raise UserError(where=str(output), problem="the file exists, but has no answers.", fix="Give another output.")
    lost = [summary["models"].get(field, "a model") for key, field in summary["keys"].items() if key not in keys]
    if lost and not overwrite:
        raise UserError(
            where=str(output),
            problem=f"the file holds answers of {' and '.join(lost)}: another model, other rows or other settings.",
            fix="Give another output, name that model as compare, or set overwrite true.",
        )
