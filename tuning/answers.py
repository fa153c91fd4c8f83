"""Answers on disk: kept as they come, so that a run can go on, and joined to the files that a user reads."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tuning.console import say
from tuning.data.questions import split_answer
from tuning.data.sources import Row
from tuning.errors import UserError
from tuning.files import CONFIG_FILE, FACTS_FILE, PROGRESS_FILE, read_json, read_lines, to_lines, write_json, write_text
from tuning.report.answers import render_answers
from tuning.scoring import mean_scores, score_rows

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
OF_A_RUN = (CONFIG_FILE, FACTS_FILE, PROGRESS_FILE, "trainer_state.json", "tracker_runs.json")
Line = dict[str, Any]
"""`index`, `file`, `row`, and `prompt`, `question`, `reference`, `references` and `prediction`, or `error`."""


class Answers:
    """The lines of one model under one setting, by index.

    Until all are there they are in `.OUTPUT.KEY.partial`, where KEY stands for `identity`, and then in `output` under
    the name that `SCORES` gives for the key.
    """

    def __init__(self, output: Path, identity: dict[str, Any], overwrite: bool):
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.path = output.with_name(f".{output.name}.{self.key}.partial")
        self.by_row: dict[int, Line] = {}
        if not overwrite:
            self.by_row = {line["index"]: line for line in [*self._of_finished_run(output), *read_lines(self.path)]}
        self._is_new = True

    def _of_finished_run(self, output: Path) -> list[Line]:
        field = ((read_json(scores_file(output)) or {}).get("keys") or {}).get(self.key)
        lines = list(read_lines(output)) if field else []
        return [line | {"prediction": line[field]} if field in line else line for line in lines]

    def begin(self) -> None:
        """Raises `UserError` where lines could not be written."""
        self.add(())
        if not self.by_row:
            self.path.unlink()

    def add(self, lines: Iterable[Line]) -> None:
        """Keep some more lines, on disk at once. Raises `UserError` where they cannot be written."""
        new = {line["index"]: line for line in lines}
        self.by_row |= new
        try:
            if self._is_new:  # what an interrupted run wrote may end in half a line
                write_text(self.path, to_lines(self.by_row.values()))
            else:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(to_lines(new.values()))
        except OSError as error:
            raise UserError(where=str(self.path), problem=f"cannot be written: {error.strerror}.") from error
        self._is_new = False


def check_output(output: Path, ours: Sequence[Answers], *, overwrite: bool) -> None:
    """Raises `UserError` where `output` holds answers that are not among `ours`, so that they would be lost."""
    summary = read_json(scores_file(output)) or {}
    keys, names = summary.get("keys") or {}, summary.get("models") or {}
    if output.exists() and not keys:
        raise UserError(
            where=str(output), problem="is there already, and is no file of answers.", fix="Give another output."
        )
    lost = [names.get(field, "a model") for key, field in keys.items() if key not in {answers.key for answers in ours}]
    if output.exists() and lost and not overwrite:
        raise UserError(
            where=str(output),
            problem=(
                f"holds the answers of {' and '.join(lost)}: of another model, of other rows, or under other settings."
            ),
            fix="Give another output, name that model as compare, or set overwrite true.",
        )


def scores_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.scores.json")


def read_references(value: Any) -> list[str]:
    """The right answers in a column: one text, a list of texts, or VQA's list of objects with an `answer`."""
    values = value if isinstance(value, (list, tuple)) else [value]
    found = [entry.get("answer") if isinstance(entry, dict) else entry for entry in values]
    return [str(entry) for entry in found if entry is not None]


def right_answers(rows: Iterable[Row], references_field: str | None = None) -> Iterator[tuple[str, str]]:
    """Every right answer, in a column or in the messages, after its row's place. Rows that cannot be read have none."""
    for row in rows:
        if references_field:
            answers: list[str | None] = [*read_references(row.columns[references_field])]
        else:
            try:
                messages = row.form.read(row.columns, row.where, needs_answer=False).messages
            except UserError:  # is told where the row is asked
                continue
            answers = [split_answer(messages)[1]]
        yield from ((row.where, answer) for answer in answers if answer is not None)


def describe_weights(name: str) -> list[list]:
    """What tells the files of a model, its processor, and the base of an adapter from those they had before; nothing of
    what is on the Hub.
    """
    folder = Path(name).expanduser()
    files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES) if folder.is_dir() else []
    own = describe_files(file for file in files if file.name not in OF_A_RUN)
    base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    return [*own, *(describe_weights(base) if base and base != name else [])]


def describe_data(path: str) -> list[list]:
    """What tells data files from those that lay there before; nothing of what is on the Hub."""
    local = Path(path).expanduser()
    return describe_files([local] if local.is_file() else sorted(file for file in local.rglob("*") if file.is_file()))


def describe_files(files: Iterable[Path]) -> list[list]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def finish(
    output: Path,
    answered: Sequence[tuple[str, Answers]],
    metrics: Sequence[str],
    show_pictures: Callable[[int], list[str]],
) -> dict[str, Any]:
    """Write the lines of one model, or of two side by side, with their scores; say how they did. Returns the summary.

    `answered`: the names of the models and their answers; those of the second stand under `compared`, and null where it
    has none. Rows that all have answered are scored. `show_pictures`: see `render_answers`.
    """
    fields = ["prediction", "compared"][: len(answered)]
    lines = [answered[0][1].by_row[index] for index in sorted(answered[0][1].by_row)]
    for field, (_, answers) in zip(fields, answered, strict=True):
        lines = [
            {**line, field: answers.by_row.get(line["index"], {}).get("prediction")} if "error" not in line else line
            for line in lines
        ]
    summary: dict[str, Any] = {
        "rows": len(lines),
        "rows_left_out": sum("error" in line for line in lines),
        "models": dict(zip(fields, (name for name, _ in answered), strict=True)),
        "scores": {},
        "keys": {answers.key: field for field, (_, answers) in zip(fields, answered, strict=True)},
    }
    scored = [line for line in lines if line.get("references") and all(line[field] is not None for field in fields)]
    for field in fields if metrics and scored else []:
        by_metric = score_rows(metrics, [line[field] for line in scored], [line["references"] for line in scored])
        summary["scores"][field] = mean_scores(by_metric)
        for number, line in enumerate(scored):
            line.setdefault("scores", {})[field] = {metric: values[number] for metric, values in by_metric.items()}
    summary["rows_scored"] = len(scored) if metrics else 0
    if metrics and not scored:
        say("Nothing is scored: no answered row has a right answer (see references_field).")
    try:
        write_text(output, to_lines(lines))
        write_json(scores_file(output), summary)
        write_text(output.with_suffix(".html"), render_answers(lines, summary, show_pictures))
    except OSError as error:
        raise UserError(where=str(output), problem=f"cannot be written: {error.strerror}.") from error
    for _, answers in answered:
        answers.path.unlink(missing_ok=True)
    say(in_words(summary, output))
    return summary


def in_words(summary: dict[str, Any], output: Path) -> str:
    """The summary as a table of models and scores."""
    names = {field: f"{name}" for field, name in summary["models"].items()}
    metrics = list(next(iter(summary["scores"].values()), {}))
    widest = max(len(name) for name in names.values())
    text = []
    if metrics:
        text = [" " * widest + "".join(f"{metric:>{max(len(metric), 8) + 2}}" for metric in metrics)]
        for field, name in names.items():
            scores = summary["scores"][field]
            cells = "".join(f"{scores[metric]:>{max(len(metric), 8) + 2}.2%}" for metric in metrics)
            text.append(f"{name:<{widest}}{cells}")
        text.append(f"Scores of {summary['rows_scored']} rows with a right answer.")
    if summary["rows_left_out"]:
        text.append(f"{summary['rows_left_out']} rows were left out; their lines say why.")
    page, answered = output.with_suffix(".html"), summary["rows"] - summary["rows_left_out"]
    return "\n".join([*text, f"Done: {output} holds {answered} answers. Look at {page}."])
