"""What the files in output_dir say of a run: pure data, from which its page is made."""

from collections.abc import Iterable
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

RUNNING, ENDED, FINISHED = "running", "ended", "finished"
TRAINING = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb", "data_wait_share")
EVALUATION = "eval_"  # how the names of an evaluation's figures begin
NO_SCORES = tuple(EVALUATION + name for name in ("loss", "tokens", "runtime", "samples_per_second", "steps_per_second"))


@dataclass(frozen=True)
class Series:
    """A figure at the steps it was logged at; a value may be no number, or infinite."""

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
class Prediction:
    """A row's answers by step: 0 is before training."""

    file: str
    row: str
    question: str
    reference: str
    images: list[str]
    answers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """`progress`: of `run_progress.json`. `training` and `validation`: figures by name, without `eval_`.
    `options`: the resolved config. `left_out`: how many rows were.
    """

    output_dir: str
    progress: dict[str, Any]
    facts: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Series]
    validation: dict[str, Series]
    predictions: list[Prediction]
    left_out: int

    @property
    def state(self) -> str:
        """RUNNING, ENDED or FINISHED; nothing if it is not known."""
        return str(self.progress.get("state", ""))

    @property
    def step(self) -> int:
        """The last step that is known of."""
        logged = [int(series.steps[-1]) for series in self.training.values()]
        return max([_whole(self.progress.get("step")), *logged])

    @property
    def max_steps(self) -> int:
        """How many steps the run will have; 0 if it is not known."""
        return _whole(self.progress.get("max_steps"))

    @property
    def seconds_left(self) -> float:
        """By the steps so far; 0 if it cannot be told."""
        left = self.progress.get("seconds_left")
        return left if isinstance(left, (int, float)) else 0.0

    @property
    def scores(self) -> dict[str, Series]:
        """What was measured of validation answers."""
        return {name: series for name, series in self.validation.items() if EVALUATION + name not in NO_SCORES}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def read_record(output_dir: Path) -> RunRecord:
    """Read a run's files; any of them may be missing, and a last line half-written. Raises `OSError`."""
    training, validation = list[dict](), dict[int, dict]()
    for line in read_lines(output_dir / LOG_FILE):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if "loss" in line:
            training.append(line)
        elif any(name.startswith(EVALUATION) for name in line):
            validation.setdefault(step, {}).update(line)
    evaluations = [line for _, line in sorted(validation.items())]
    measured = dict.fromkeys(name for line in evaluations for name in line if name.startswith(EVALUATION))
    return RunRecord(
        output_dir=str(output_dir),
        progress=_read_progress(output_dir),
        facts=_read_object(output_dir / RUN_INFO_FILE),
        options=_read_object(output_dir / CONFIG_FILE),
        training=_collect(training, TRAINING),
        validation={name.removeprefix(EVALUATION): series for name, series in _collect(evaluations, measured).items()},
        predictions=_read_predictions(output_dir / SAMPLES_FILE),
        left_out=sum(1 for _ in read_lines(output_dir / SKIPPED_FILE)),
    )


def _read_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _read_progress(output_dir: Path) -> dict[str, Any]:
    """Progress as it was written, else what the mark of a finished run tells."""
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


def _read_predictions(path: Path) -> list[Prediction]:
    """One a row, in the order in which rows appear."""
    found: dict[tuple[str, str], Prediction] = {}
    for line in read_lines(path):
        step = line.get("step")
        texts = {name: str(line.get(name, "")) for name in ("file", "row", "question", "reference", "prediction")}
        key = (texts["file"], texts["row"])
        if key not in found:
            images = line.get("images")
            images = [uri for uri in images if isinstance(uri, str)] if isinstance(images, list) else []
            found[key] = Prediction(*key, texts["question"], texts["reference"], images)
        if isinstance(step, int):
            found[key].answers[step] = texts["prediction"]
    return list(found.values())
