"""Answers on disk: kept as they come, so that a run can go on, and joined to the files that a user reads."""

import sys
from pathlib import Path

if not __package__:  # run by path, as a launcher does: Python puts this folder first
    sys.path[0] = str(Path(__file__).resolve().parents[2])


import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tuning.config.options import ModelSource, RowArguments, option
from tuning.config.parse import describe_command, read_command
from tuning.console import print0
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.data.from_config import image_rules, make_encoder, open_path, print_formats
from tuning.data.images import load_image, thumbnail
from tuning.data.prompts import Question, ask_or_error, read_references, right_answers
from tuning.data.sources import Row, Source
from tuning.distributed.launch import DDP_SETTINGS, check_processes, choose_launch_options, launch
from tuning.distributed.processes import exit_process
from tuning.errors import UserError
from tuning.exit_codes import exit_code_of, on_interrupt_say
from tuning.files import (
    CONFIG_FILE,
    PROGRESS_FILE,
    RUN_INFO_FILE,
    read_json,
    read_lines,
    to_lines,
    write_json,
    write_text,
)
from tuning.machine import default_workers
from tuning.metrics import check_metrics, check_right_answers, mean_scores, score_rows
from tuning.model.answering import load_answering
from tuning.model.lora import find_adapter, load_base
from tuning.pages.answers_page import render_answers
from tuning.training.evaluation import answer, share_out

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
OF_A_RUN = (CONFIG_FILE, RUN_INFO_FILE, PROGRESS_FILE, "trainer_state.json", "tracker_runs.json")
Line = dict[str, Any]
"""`index`, `file`, `row`, and `prompt`, `question`, `reference`, `references` and `prediction`, or `error`."""


class Answers:
    """The lines of one model under one setting, by index.

    Until all are there they are in `.OUTPUT.KEY.partial`, where KEY stands for `identity`, and then in `output` under
    the name that `SCORES` gives for the key.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], overwrite: bool):
        self.key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()[:12]
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
        print0("Nothing is scored: no answered row has a right answer (see references_field).")
    try:
        write_text(output, to_lines(lines))
        write_json(scores_file(output), summary)
        write_text(output.with_suffix(".html"), render_answers(lines, summary, show_pictures))
    except OSError as error:
        raise UserError(where=str(output), problem=f"cannot be written: {error.strerror}.") from error
    for _, answers in answered:
        answers.path.unlink(missing_ok=True)
    print0(in_words(summary, output))
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


USAGE = "vlm-tuning predict config.json | --model_name_or_path DIR --data_path FILE …"


@dataclass(frozen=True)
class PredictArguments:
    data_path: str = option("", "Rows to answer: a .json, .jsonl, .parquet or .arrow file, a folder, or a hub id.")
    output: str = option("predictions.jsonl", "Where the answers go, a JSON object a line.")
    metrics: list[str] | str | None = option(None, "Scores to compute, such as exact_match, anls or relaxed_accuracy.")
    references_field: str | None = option(None, "Column with the right answers, where a row has several.")
    compare: str | None = option(None, "Another model, such as the base, whose answers stand beside.")
    max_new_tokens: int = option(256, "Longest answer in tokens.")
    batch_size: int = option(8, "Rows answered at once, by each process.")
    max_rows: int | None = option(None, "Answer only so many rows (default: all).")
    overwrite: bool = option(False, "Answer anew what an earlier run has answered.")
    accelerate_launch_args: dict[str, Any] = option({}, "Options of `accelerate launch`, such as num_processes.")

    @property
    def metric_names(self) -> list[str]:
        return [self.metrics] if isinstance(self.metrics, str) else list(self.metrics or [])


OPTIONS = (ModelSource, RowArguments, PredictArguments)


def predict(source: ModelSource, rows: RowArguments, options: PredictArguments) -> dict[str, Any]:
    """Answer all rows with the model, and with the one it is compared to. Returns the summary that is written, too.

    Raises `UserError` where the input is at fault; what was answered by then is kept, and the next run goes on there.
    """
    check_metrics(options.metric_names)
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # every process has the whole model
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_processes(state.num_processes)
    output = Path(options.output)
    extra = [options.references_field] if options.references_field else []
    data = open_path(rows, options.data_path, rows.dataset_split, more_fields=extra)
    print_formats(data.files, rows)
    models = [source, *([replace(source, model_name_or_path=options.compare)] if options.compare else [])]
    check_models(models)
    asked = range(min(len(data), options.max_rows or len(data)))
    check_right_answers(options.metric_names, right_answers(map(data.__getitem__, asked), options.references_field))
    answered = [(model, Answers(output, identify(model, rows, options, data), options.overwrite)) for model in models]
    check_output(output, [answers for _, answers in answered], overwrite=options.overwrite)
    state.wait_for_everyone()  # until all have read what there is
    for model, answers in answered:
        if state.is_main_process:
            answers.begin()
        open_rows = [row for row in asked if row not in answers.by_row]
        (open_rows,) = broadcast_object_list([open_rows])  # another machine may not see what the first has kept
        if open_rows:
            answer_rows(model, rows, options, data, open_rows, answers, state)
    if not state.is_main_process:
        return {}
    named = [(model.model_name_or_path, answers) for model, answers in answered]
    return finish(output, named, options.metric_names, lambda index: show_pictures(data[index], rows))


def check_models(models: Sequence[ModelSource]) -> None:
    """Raises `UserError` for what can be told of models before the first one is loaded."""
    for name, model in zip(("model_name_or_path", "compare"), models, strict=False):
        try:
            load_base(model, find_adapter(model.model_name_or_path))
        except UserError as error:
            raise UserError(
                where=error.where.replace("model_name_or_path", name), problem=error.problem, fix=error.fix
            ) from error


def identify(source: ModelSource, rows: RowArguments, options: PredictArguments, data: Source) -> dict[str, Any]:
    """What must be the same for answers of an earlier run to be kept."""
    same = {
        "weights": describe_weights(source.model_name_or_path),
        "rows": [data.fingerprint(), describe_data(options.data_path)],
        "references_field": options.references_field,
        "max_new_tokens": options.max_new_tokens,
    }
    return asdict(source) | asdict(rows) | same


def answer_rows(
    source: ModelSource,
    rows: RowArguments,
    options: PredictArguments,
    data: Source,
    open_rows: Sequence[int],
    answers: Answers,
    state: PartialState,
) -> None:
    """Add the answers to `open_rows`; of several processes each takes its share of every round of batches."""
    loaded = load_answering(source, device=state.device)
    encoder = make_encoder(rows, loaded.processor, loaded.config, rows.date_string)
    collator = probe_collator(encoder.processor)
    batches = share_out(open_rows, options.batch_size, rank=state.process_index, world=state.num_processes)
    questions = Questions(data, encoder, options.references_field)
    loader = DataLoader(questions, batch_sampler=batches, collate_fn=list, num_workers=default_workers())
    name = Path(source.model_name_or_path).name
    bar = tqdm(total=len(open_rows), desc=f"{name} answers", unit="row", disable=not state.is_main_process)
    number_kept = len(answers.by_row)
    with bar, on_interrupt_say(lambda: f"{number_kept} answers are kept: the same command would go on there."):
        for batch in loader:
            asked = [question.sample for _, question in batch if isinstance(question, Question)]
            limit = options.max_new_tokens
            texts = answer(loaded.model, asked, encoder, collator, max_new_tokens=limit) if asked else []
            given = iter(texts)
            mine = [describe(index, question, given, data) for index, question in batch]
            everyones = gather_object(mine)
            bad = [line for line in everyones if "error" in line]
            kept = [line for line in everyones if "error" not in line or rows.on_bad_row == "skip"]
            if state.is_main_process:
                answers.add(kept)
            number_kept += len(kept)
            if bad and rows.on_bad_row == "error":
                raise UserError(problem=bad[0]["error"], fix="Mend the row, or set on_bad_row skip.")
            bar.update(len(everyones))


def describe(index: int, question: Question | UserError, texts: Iterator[str], data: Source) -> dict[str, Any]:
    """The line of a row: its question with the next of `texts`, or what is wrong with it."""
    if isinstance(question, UserError):
        row = data[index]
        return {"index": index, "file": row.file, "row": row.number, "error": str(question)}
    return {
        "index": index,
        "file": question.file,
        "row": question.number,
        "prompt": question.prompt,
        "question": question.text,
        "reference": question.reference,
        "references": question.references,
        "prediction": next(texts),
    }


def show_pictures(row: Row, rows: RowArguments) -> list[str]:
    """Small versions of a row's images as data URIs."""
    images = row.format.read(row.columns, row.where, needs_answer=False).images
    return [thumbnail(load_image(image, row.folder, row.where, image_rules(rows))) for image in images]


class Questions(Dataset):
    """Rows as questions, made when asked for, each with its index."""

    def __init__(self, data: Source, encoder: Encoder, references_field: str | None):
        self.data, self.encoder, self.references_field = data, encoder, references_field

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Question | UserError]:
        row = self.data[index]
        question = ask_or_error(row, self.encoder)
        if self.references_field is None or isinstance(question, UserError):
            return index, question
        references = read_references(row.columns[self.references_field])
        return index, replace(question, references=references)


def start(arguments: Sequence[str]) -> None:
    """Answer in this process, or in as many as the options ask for."""
    source, rows, options = read_command(arguments, *OPTIONS, required=("model_name_or_path", "data_path"))
    if launch_args := choose_launch_options(options.accelerate_launch_args, all_gpus=True):
        launch(launch_args, [__file__, *arguments], settings=DDP_SETTINGS)
    else:
        predict(source, rows, options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(describe_command(USAGE, *OPTIONS))
        return 0
    return exit_code_of(lambda: start(arguments))


if __name__ == "__main__":
    exit_process(main())
