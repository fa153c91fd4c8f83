"""`vlm-tuning predict`: let a model answer the questions of a dataset, score the answers, and compare two models.

Answers are written as they come: an interrupted command continues where it stopped.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tuning.commands.kept_answers import Answers, Line, check_output, describe_files, describe_weights, scores_file
from tuning.commands.predict_options import PredictArguments, check_models_named, name_served_models
from tuning.commands.served_answers import answer_by_server
from tuning.config.options import ModelSource, RowArguments
from tuning.config.parse import to_flags
from tuning.console import print0
from tuning.data.collator import Collator, probe_collator
from tuning.data.encode import Encoder, Sample
from tuning.data.from_config import check_config_name, image_rules, make_encoder, open_path, print_formats
from tuning.data.images import load_image, thumbnail
from tuning.data.prompts import ask_or_error, read_references, right_answers
from tuning.data.sources import Row, Source
from tuning.distributed.launch import DDP_SETTINGS, check_processes, choose_launch_options, launch
from tuning.distributed.watch import watch_processes
from tuning.errors import UserError, writing
from tuning.exit_codes import LAUNCHED, on_interrupt_say
from tuning.files import to_lines, write_json, write_text
from tuning.machine import default_workers
from tuning.metrics import METRICS, check_metrics, check_references, score_rows
from tuning.model.answering import LoadedModel, load_answering
from tuning.model.lora import find_adapter, load_base
from tuning.pages.answers_page import render_answers
from tuning.serving.server import connect
from tuning.training.batch_check import find_batch_fault
from tuning.training.evaluation import answer, share_out
from tuning.training.optimizer import HALF

PROGRAM = ("-m", "tuning.cli", "predict")  # what a launcher starts
COLUMN = 2 + max(map(len, METRICS))  # width of a score on the terminal
NEW_OPTIONS = ("bbox_format", "chat_template_kwargs")  # answers of earlier versions were given without them
OPTIONS = PredictArguments


@dataclass(frozen=True)
class Task:
    """The rows to answer, their `indices` in the data, and for each field of the output its model and its answers."""

    data: Source
    indices: range
    models: Mapping[str, PredictArguments]
    answers: Mapping[str, Answers]

    def open_rows(self, field: str) -> list[int]:
        """The rows that this model has yet to answer."""
        return [index for index in self.indices if index not in self.answers[field].by_row]


def run(options: PredictArguments) -> None:
    """Answer in this process, or in as many as the options ask for. Servers are asked by this one."""
    check_models_named(options)
    options = name_served_models(options)
    models = options.models().values()
    if all(model.server_url for model in models):
        predict(options)
        return
    every_gpu_has_all = options.device_map is None
    launch_args = choose_launch_options(options.accelerate_launch_args, all_gpus=every_gpu_has_all)
    if not launch_args:
        predict(options)
        return
    if any(model.server_url for model in models):
        ask_servers(open_task(options))
    launch(launch_args, [*PROGRAM, *to_flags(options)], settings=DDP_SETTINGS)


def predict(options: PredictArguments) -> None:
    """Answer all rows with the model, and with the one to compare, and write the results.

    Raises `UserError` if the input is at fault. The answers until then are kept, and the next run continues there.
    """
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # every process has the whole model
    only_served = all(model.server_url for model in options.models().values())
    state = PartialState(cpu=only_served or not torch.accelerator.is_available())
    watch_processes()
    check_processes(state.num_processes)
    if options.device_map and state.num_processes > 1:
        raise UserError(
            where=f"device_map {options.device_map}",
            problem=f"shares one model out over all GPUs, and each of {state.num_processes} processes would do so.",
            fix="Start one process: leave accelerate_launch_args and the launcher out, or remove device_map.",
        )
    task = open_task(options)
    state.wait_for_everyone()  # until all have read which answers there are
    if state.num_processes == 1:
        ask_servers(task)
    for field, model in task.models.items():
        if state.is_main_process:
            task.answers[field].check_writable()
        (open_rows,) = broadcast_object_list([task.open_rows(field)])  # other machines may not see the first's files
        if open_rows and model.server_url:
            raise UserError(
                where=model.name,
                problem=f"{len(open_rows)} rows are left, and one process asks a server, not {state.num_processes}.",
                fix="Start the command without a launcher: it starts other processes after that.",
            )
        if open_rows:
            answer_rows(model, task.data, open_rows, task.answers[field], state)
    if state.is_main_process:
        write_results(task)


def open_task(options: PredictArguments) -> Task:
    """Open the rows, and find out which answers there are. Raises `UserError` for what can be known before any more."""
    check_metrics(options.metric_names)
    check_config_name(options, [options.data_path])
    more_fields = [options.references_field] if options.references_field else []
    split = options.dataset_split
    data = open_path(options, options.data_path, split, more_fields=more_fields, needs_answers=False)
    print_formats(data.files, options)
    indices = range(min(len(data), options.max_rows or len(data)))
    check_references(options.metric_names, right_answers(map(data.__getitem__, indices), options.references_field))
    models = options.models()
    check_models_here(models)
    output, answers = Path(options.output), {}
    for field, model in models.items():
        just_asked = bool(model.server_url) and LAUNCHED in os.environ  # by the process that has started this one
        overwrite = options.overwrite and not just_asked
        answers[field] = Answers(fingerprint(model, data), output, overwrite=overwrite)
    check_output(output, {one.key for one in answers.values()}, overwrite=options.overwrite)
    return Task(data, indices, models, answers)


def check_models_here(models: Mapping[str, PredictArguments]) -> None:
    """Raise `UserError` for what the configurations of all models show, before the first model is loaded."""
    for name, model in zip(("model_name_or_path", "compare"), models.values(), strict=False):
        if model.server_url:
            continue
        try:
            load_base(model, find_adapter(model.model_name_or_path))
        except UserError as error:
            where = error.where.replace("model_name_or_path", name)
            raise UserError(where=where, problem=error.problem, fix=error.fix) from error


def ask_servers(task: Task) -> None:
    """Let servers answer their rows. Raises `UserError` where one cannot be reached, before any is asked."""
    asked = {field: model for field, model in task.models.items() if model.server_url and task.open_rows(field)}
    servers = {
        field: connect(model, "compare" if field == "compared" else "server_url") for field, model in asked.items()
    }
    for field, server in servers.items():
        answers = task.answers[field]
        answers.check_writable()
        answer_by_server(server, task.models[field], task.data, task.open_rows(field), answers)


def answer_rows(
    options: PredictArguments, data: Source, open_rows: Sequence[int], answers: Answers, state: PartialState
) -> None:
    """Add the answers to `open_rows`. Each of several processes takes its share of every round of batches."""
    loaded = load_answering(options, device=state.device, device_map=options.device_map)
    encoder = make_encoder(
        options,
        loaded.processor,
        loaded.config,
        options.date_string,
        template_kwargs=options.chat_template_kwargs,
        tokens=loaded.tokens,
    )
    collator = probe_collator(encoder.processor)
    batch_size = options.batch_size
    if batch_size > 1 and len(open_rows) > 1 and (fault := find_prompt_fault(loaded, encoder, collator)):
        print0(f"The rows are answered one by one: in a batch they would get other answers ({fault}).")
        batch_size = 1
    batches = share_out(open_rows, batch_size, rank=state.process_index, world=state.num_processes)
    questions = Questions(data, encoder, options.references_field)
    loader = DataLoader(questions, batch_sampler=batches, collate_fn=list, num_workers=default_workers())
    name = Path(options.model_name_or_path).name
    bar = tqdm(total=len(open_rows), desc=f"{name} answers", unit="row", disable=not state.is_main_process)
    kept = len(answers.by_row)
    with bar, on_interrupt_say(lambda: f"{kept} answers are kept. Run the same command again to continue."):
        for batch in loader:
            asked = [(line, sample) for line, sample in batch if sample is not None]
            samples, limit = [sample for _, sample in asked], options.max_new_tokens
            texts = answer(loaded.model, samples, encoder, collator, max_new_tokens=limit) if samples else []
            for (line, _), text in zip(asked, texts, strict=True):
                line["prediction"] = text
            lines = gather_object([line for line, _ in batch])
            bad = [line for line in lines if "error" in line]
            new = lines if options.on_bad_row == "skip" else [line for line in lines if "error" not in line]
            if state.is_main_process:
                answers.add(new)
            kept += len(new)
            if len(new) < len(lines):
                raise UserError(problem=bad[0]["error"], fix="Correct the row, or set on_bad_row skip.")
            bar.update(len(lines))


def find_prompt_fault(loaded: LoadedModel, encoder: Encoder, collator: Collator) -> str:
    """How prompts in a batch get other results than alone; "" where they do not. See `find_batch_fault`."""
    model = loaded.model

    def forward(labels: torch.Tensor, num_items_in_batch: int, **inputs: Any) -> Any:
        return model(**send_to_device(inputs, model.device))

    return find_batch_fault(model, forward, encoder, collator, half=model.dtype in HALF)


class Questions(Dataset):
    """Rows as lines of the output and prompts to answer; a bad row is a line with its error, and no prompt."""

    def __init__(self, data: Source, encoder: Encoder, references_field: str | None):
        self.data, self.encoder, self.references_field = data, encoder, references_field

    def __getitem__(self, index: int) -> tuple[Line, Sample | None]:
        row = self.data[index]
        line = {"index": index, "file": row.file, "row": row.number}
        question = ask_or_error(row, self.encoder)
        if isinstance(question, UserError):
            return line | {"error": str(question)}, None
        line |= {"prompt": question.prompt, "question": question.text, "reference": question.reference}
        line |= {"boxes": [asdict(box) for box in question.boxes]} if question.boxes else {}
        field = self.references_field
        references = question.references if field is None else read_references(row.columns[field])
        return line | {"references": references}, question.sample


def fingerprint(options: PredictArguments, data: Source) -> dict[str, Any]:
    """What must be the same for the answers of an earlier run to be kept. Nothing of it is read from the Hub."""
    path = Path(options.data_path).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    same = {entry.name: getattr(options, entry.name) for entry in (*fields(ModelSource), *fields(RowArguments))}
    same = {name: value for name, value in same.items() if value or name not in NEW_OPTIONS}
    served = ("server_url", "model", "request_options")
    if options.server_url:
        same |= {name: getattr(options, name) for name in served}
    return same | {
        "weights": [] if options.server_url else describe_weights(options.model_name_or_path),
        "rows": [data.fingerprint(), describe_files(files)],
        "references_field": options.references_field,
        "max_new_tokens": options.max_new_tokens,
    }


def write_results(task: Task) -> None:
    """Write the answers of all models side by side, their scores and a page, and print a summary."""
    models, options, lines = task.models, task.models["prediction"], []
    for index, line in sorted(task.answers["prediction"].by_row.items()):
        texts = {field: answers.by_row.get(index, {}).get("prediction") for field, answers in task.answers.items()}
        lines.append(line if "error" in line else line | texts)
    output, metrics = Path(options.output), options.metric_names
    scored = score_lines(lines, list(models), metrics) if metrics else []
    if metrics and not scored:
        print0("Nothing is scored: no answered row has a right answer (see references_field).")
    summary: dict[str, Any] = {
        "rows": len(lines),
        "rows_left_out": sum("error" in line for line in lines),
        "models": {field: model.name for field, model in models.items()},
        "scores": {},
        "keys": {answers.key: field for field, answers in task.answers.items()},
        "rows_scored": len(scored),
    }
    for field in models if scored else ():
        of_rows = [line["scores"][field] for line in scored]
        summary["scores"][field] = {metric: fmean(scores[metric] for scores in of_rows) for metric in metrics}
    page = render_answers(lines, summary, lambda index: show_images(task.data[index], options))
    with writing(output):
        write_text(output, to_lines(lines))
        write_json(scores_file(output), summary)
        write_text(output.with_suffix(".html"), page)
    for answers in task.answers.values():
        answers.path.unlink(missing_ok=True)
    print0(describe_results(summary, output))


def score_lines(lines: Sequence[Line], fields: Sequence[str], metrics: Sequence[str]) -> list[Line]:
    """Add `scores` to the lines that have a right answer and one of each model. Returns these lines."""
    scored = [line for line in lines if line.get("references") and all(line[field] is not None for field in fields)]
    for field in fields:
        by_metric = score_rows(metrics, [line[field] for line in scored], [line["references"] for line in scored])
        for number, line in enumerate(scored):
            line.setdefault("scores", {})[field] = {metric: values[number] for metric, values in by_metric.items()}
    return scored


def show_images(row: Row, options: RowArguments) -> list[str]:
    """Small versions of a row's images as data URIs."""
    images = row.format.read(row.columns, row.where, needs_answer=False).images
    return [thumbnail(load_image(image, row.folder, row.where, image_rules(options))) for image in images]


def describe_results(summary: Mapping[str, Any], output: Path) -> str:
    """What is printed at the end: a table of models and scores, and where the answers are."""
    names, text = summary["models"], list[str]()
    widest = max(map(len, names.values()))
    for field, scores in summary["scores"].items():
        if not text:
            text.append(" " * widest + "".join(f"{metric:>{COLUMN}}" for metric in scores))
        text.append(f"{names[field]:<{widest}}" + "".join(f"{score:>{COLUMN}.2%}" for score in scores.values()))
    if text:
        text.append(f"Scores of {summary['rows_scored']} rows with a right answer.")
    if summary["rows_left_out"]:
        text.append(f"{summary['rows_left_out']} rows were left out. Their lines name the reason.")
    page, answers = output.with_suffix(".html"), summary["rows"] - summary["rows_left_out"]
    return "\n".join([*text, f"Done: {output} holds {answers} answers. Look at {page}."])
