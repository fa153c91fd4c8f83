"""`vlm-tuning predict`: the answers of a model to the questions of a dataset, and their scores."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run by path, as a launcher does: Python puts this folder first
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import tuning  # noqa: F401 - before the others: it silences what they import

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tuning.answers import (
    Answers,
    check_output,
    describe_data,
    describe_weights,
    finish,
    read_references,
    right_answers,
)
from tuning.config.arguments import ModelSource, RowArguments, option
from tuning.config.parse import describe_command, read_command
from tuning.config.validate import default_workers
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.data.images import load_image, thumbnail
from tuning.data.questions import Question, ask_or_error
from tuning.data.sources import Row, Source
from tuning.data_paths import image_rules, make_encoder, open_path, say_forms
from tuning.errors import UserError, exit_code_of, tell_what_is_kept
from tuning.launch import WHOLE_COPIES, check_processes, launch, wanted_launch
from tuning.model.adapters import find_adapter, load_answering, load_base_config
from tuning.scoring import check_metrics, check_right_answers
from tuning.training.answering import answer, share_out
from tuning.training.processes import leave

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
    say_forms(data.parts, rows)
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
            load_base_config(model, find_adapter(model.model_name_or_path))
        except UserError as error:
            raise UserError(
                where=error.where.replace("model_name_or_path", name), problem=error.problem, fix=error.fix
            ) from error


def identify(source: ModelSource, rows: RowArguments, options: PredictArguments, data: Source) -> dict[str, Any]:
    """What must be the same for answers of an earlier run to be kept."""
    same = {
        "weights": describe_weights(source.model_name_or_path),
        "rows": [data.identity(), describe_data(options.data_path)],
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
    with bar, tell_what_is_kept(lambda: f"{number_kept} answers are kept: the same command would go on there."):
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
    images = row.form.read(row.columns, row.where, needs_answer=False).images
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
    if launch_args := wanted_launch(options.accelerate_launch_args, all_gpus=True):
        launch(launch_args, arguments, script=Path(__file__), settings=WHOLE_COPIES)
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
    leave(main())
