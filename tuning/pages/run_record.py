"""The files in output_dir that describe a run, read as pure data. The run's page is made of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuning.files import (
    COMPLETE_FILE,
    CONFIG_FILE,
    LOG_FILE,
    PROGRESS_FILE,
    RUN_INFO_FILE,
    SAMPLES_FILE,
    SKIPPED_FILE,
    read_json,
    read_lines,
)
from tuning.pages.pictures import Picture

RUNNING, ENDED, FINISHED = "running", "ended", "finished"
TRAINING = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb", "data_wait_share")
EVAL_PREFIX = "eval_"
NOT_SCORES = ("loss", "tokens", "runtime", "samples_per_second", "steps_per_second")


@dataclass(frozen=True)
class Series:
    """A figure and the steps it was logged at, in order. Values may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @staticmethod
    def empty() -> "Series":
        return Series(np.array([], int), np.array([]))

    def by_step(self) -> dict[int, float]:
        return dict(zip(self.steps.tolist(), self.values.tolist(), strict=True))

    def finite(self) -> "Series":
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass
class AnsweredRow:
    """A row and the answers it got, by step. Step 0 is before training. `images` are data URIs, or drawn over."""

    file: str
    row: str
    question: str
    reference: str
    images: Sequence[str | Picture]
    answers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """`progress` is the content of run_progress.json, `info` that of run_facts.json, `options` the resolved config.

    `training` and `validation` are figures by name, without `eval_`. `rows_left_out` counts skipped rows.
    """

    output_dir: str
    progress: dict[str, Any]
    info: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Series]
    validation: dict[str, Series]
    answered_rows: list[AnsweredRow]
    rows_left_out: int

    @property
    def state(self) -> str:
        """RUNNING, ENDED or FINISHED, or empty if it is not known."""
        return str(self.progress.get("state", ""))

    @property
    def step(self) -> int:
        """The last step that the files know of."""
        logged = [int(series.steps[-1]) for series in self.training.values()]
        return max([_int_or_zero(self.progress.get("step")), *logged])

    @property
    def max_steps(self) -> int:
        """How many steps the run will have, or 0 if it is not known."""
        return _int_or_zero(self.progress.get("max_steps"))

    @property
    def seconds_left(self) -> float:
        """Estimated from the steps so far, or 0 if it is not known."""
        left = self.progress.get("seconds_left")
        return left if isinstance(left, (int, float)) else 0.0

    @property
    def scores(self) -> dict[str, Series]:
        """The scores of generated answers."""
        return {name: series for name, series in self.validation.items() if name not in NOT_SCORES}


def _int_or_zero(value: Any) -> int:
    return value if isinstance(value, int) else 0


def read_record(output_dir: Path) -> RunRecord:
    """Read a run's files. Any of them may be missing, and a last line half-written. Raises `OSError`."""
    training, evaluations = list[dict](), dict[int, dict]()
    for line in read_lines(output_dir / LOG_FILE):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if "loss" in line:
            training.append(line)
        elif any(name.startswith(EVAL_PREFIX) for name in line):
            evaluations.setdefault(step, {"step": step}).update(_without_prefix(line))
    by_step = [line for _, line in sorted(evaluations.items())]
    return RunRecord(
        output_dir=str(output_dir),
        progress=_read_progress(output_dir),
        info=_read_object(output_dir / RUN_INFO_FILE),
        options=_read_object(output_dir / CONFIG_FILE),
        training=_collect(training, TRAINING),
        validation=_collect(by_step, dict.fromkeys(name for line in by_step for name in line if name != "step")),
        answered_rows=_read_answered_rows(output_dir / SAMPLES_FILE),
        rows_left_out=sum(1 for _ in read_lines(output_dir / SKIPPED_FILE)),
    )


def _without_prefix(line: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation."""
    return {name.removeprefix(EVAL_PREFIX): value for name, value in line.items() if name.startswith(EVAL_PREFIX)}


def _read_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _read_progress(output_dir: Path) -> dict[str, Any]:
    """The progress file, or where there is none, what the mark of a finished run contains."""
    progress = _read_object(output_dir / PROGRESS_FILE)
    finished = _read_object(output_dir / COMPLETE_FILE)
    if progress or not finished:
        return progress
    return {"state": FINISHED, "step": finished.get("global_step")}


def _collect(lines: list[dict[str, Any]], names: Iterable[str]) -> dict[str, Series]:
    """The numbers called `names` by step."""
    found = {}
    for name in names:
        numbers = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
        if numbers:
            steps, values = zip(*numbers, strict=True)
            found[name] = Series(np.array(steps), np.array(values, float))
    return found


def _read_answered_rows(path: Path) -> list[AnsweredRow]:
    """One for each row, in the order in which rows appear."""
    found: dict[tuple[str, str], AnsweredRow] = {}
    for line in read_lines(path):
        step = line.get("step")
        texts = {name: str(line.get(name, "")) for name in ("file", "row", "question", "reference", "prediction")}
        key = (texts["file"], texts["row"])
        if key not in found:
            images = line.get("images")
            images = [uri for uri in images if str(uri).startswith("data:image/")] if isinstance(images, list) else []
            found[key] = AnsweredRow(*key, texts["question"], texts["reference"], images)
        if isinstance(step, int):
            found[key].answers[step] = texts["prediction"]
    return list(found.values())
