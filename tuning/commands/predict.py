"""`vlm-tuning predict`: let a model answer the questions of a dataset, score the answers, and compare two models.

Answers are written as they come: an interrupted command continues where it stopped.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tuning.config.options import ModelSource, RowArguments, option
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
from tuning.exit_codes import on_interrupt_say
from tuning.files import (
    CONFIG_FILE,
    PROGRESS_FILE,
    RUN_INFO_FILE,
    RUNS_FILE,
    STATE_FILE,
    read_json,
    read_lines,
    to_lines,
    write_json,
    write_text,
)
from tuning.machine import default_workers
from tuning.metrics import METRICS, check_metrics, check_references, score_rows
from tuning.model.answering import LoadedModel, load_answering
from tuning.model.lora import find_adapter, load_base
from tuning.pages.answers_page import render_answers
from tuning.training.batch_check import find_batch_fault
from tuning.training.evaluation import answer, share_out
from tuning.training.optimizer import HALF

PROGRAM = ("-m", "tuning.cli", "predict")  # what a launcher starts
COLUMN = 2 + max(map(len, METRICS))  # width of a score on the terminal
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
NEW_OPTIONS = ("bbox_format", "chat_template_kwargs")  # answers of earlier versions were given without them
OF_A_RUN = (CONFIG_FILE, RUN_INFO_FILE, PROGRESS_FILE, STATE_FILE, RUNS_FILE)
Line = dict[str, Any]
"""`index`, `file`, `row`, and `prompt`, `question`, `reference`, `references` and `prediction`, or `error`.

`boxes` of a row that has some: see `BoxOnImage`.
"""


@dataclass(frozen=True)
class PredictArguments(RowArguments, ModelSource):
    data_path: str = option("", "Rows to answer: any file that training reads, a folder, or a hub id.", required=True)
    output: str = option("predictions.jsonl", "File for the answers, one JSON object per line.")
    metrics: list[str] | str | None = option(None, "Scores to compute, such as exact_match, anls or relaxed_accuracy.")
    references_field: str | None = option(None, "Column with the right answers, if a row has several.")
    compare: str | None = option(None, "A second model to compare with, such as the base.")
    max_new_tokens: int = option(256, "Longest answer in tokens.", minimum=1)
    batch_size: int = option(8, "Rows that each process answers at once.", minimum=1)
    max_rows: int | None = option(None, "Answer at most N rows (default: all).", minimum=1)
    overwrite: bool = option(False, "Answer all rows again, although an earlier run has answered them.")
    accelerate_launch_args: dict[str, Any] = option({}, "Options of `accelerate launch`, such as num_processes.")
    device_map: str | None = option(
        None,
        "Share the layers of a model that is larger than one GPU out over all GPUs, in one process.",
        choices=("auto", "balanced", "sequential"),
    )

    @property
    def metric_names(self) -> list[str]:
        return [self.metrics] if isinstance(self.metrics, str) else list(self.metrics or [])


OPTIONS = PredictArguments


def run(options: PredictArguments) -> None:
    """Answer in this process, or in as many as the options ask for."""
    every_gpu_has_all = options.device_map is None
    if launch_args := choose_launch_options(options.accelerate_launch_args, all_gpus=every_gpu_has_all):
        launch(launch_args, [*PROGRAM, *to_flags(options)], settings=DDP_SETTINGS)
    else:
        predict(options)


def predict(options: PredictArguments) -> None:
    """Answer all rows with the model, and with the one to compare, and write the results.

    Raises `UserError` if the input is at fault. The answers until then are kept, and the next run continues there.
    """
    check_metrics(options.metric_names)
    os.environ["ACCELERATE_USE_FSDP"] = "false"  # every process has the whole model
    state = PartialState(cpu=not torch.accelerator.is_available())
    watch_processes()
    check_processes(state.num_processes)
    if options.device_map and state.num_processes > 1:
        raise UserError(
            where=f"device_map {options.device_map}",
            problem=f"shares one model out over all GPUs, and each of {state.num_processes} processes would do so.",
            fix="Start one process: leave accelerate_launch_args and the launcher out, or remove device_map.",
        )
    check_config_name(options, [options.data_path])
    more_fields = [options.references_field] if options.references_field else []
    split = options.dataset_split
    data = open_path(options, options.data_path, split, more_fields=more_fields, needs_answers=False)
    print_formats(data.files, options)
    indices = range(min(len(data), options.max_rows or len(data)))
    check_references(options.metric_names, right_answers(map(data.__getitem__, indices), options.references_field))

    models = {"prediction": options}  # the field of a model's answers → options with its name
    if options.compare:
        models["compared"] = replace(options, model_name_or_path=options.compare)
    check_models(models)
    answered = {field: Answers(model, data) for field, model in models.items()}
    check_output(options, {answers.key for answers in answered.values()})
    state.wait_for_everyone()  # until all have read which answers there are
    for field, answers in answered.items():
        if state.is_main_process:
            answers.check_writable()
        open_rows = [index for index in indices if index not in answers.by_row]
        (open_rows,) = broadcast_object_list([open_rows])  # other machines may not see the first one's files
        if open_rows:
            answer_rows(models[field], data, open_rows, answers, state)
    if state.is_main_process:
        write_results(models, answered, data)


def check_models(models: Mapping[str, PredictArguments]) -> None:
    """Raise `UserError` for what the configurations of all models show, before the first model is loaded."""
    for name, model in zip(("model_name_or_path", "compare"), models.values(), strict=False):
        try:
            load_base(model, find_adapter(model.model_name_or_path))
        except UserError as error:
            where = error.where.replace("model_name_or_path", name)
            raise UserError(where=where, problem=error.problem, fix=error.fix) from error


def answer_rows(
    options: PredictArguments, data: Source, open_rows: Sequence[int], answers: "Answers", state: PartialState
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


class Answers:
    """The lines of one model by index.

    Until all are there they are in `.OUTPUT.KEY.partial`, where KEY is a hash of `fingerprint`. Then they are in
    `output`, in the field that the file of scores names for the key.
    """

    def __init__(self, options: PredictArguments, data: Source):
        same, output = json.dumps(fingerprint(options, data), sort_keys=True, default=str), Path(options.output)
        self.key = hashlib.sha256(same.encode()).hexdigest()[:12]
        self.path = output.with_name(f".{output.name}.{self.key}.partial")
        lines = [] if options.overwrite else [*self._of_finished_run(output), *read_lines(self.path)]
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


def fingerprint(options: PredictArguments, data: Source) -> dict[str, Any]:
    """What must be the same for the answers of an earlier run to be kept. Nothing of it is read from the Hub."""
    path = Path(options.data_path).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    same = {entry.name: getattr(options, entry.name) for entry in (*fields(ModelSource), *fields(RowArguments))}
    same = {name: value for name, value in same.items() if value or name not in NEW_OPTIONS}
    return same | {
        "weights": describe_weights(options.model_name_or_path),
        "rows": [data.fingerprint(), describe_files(files)],
        "references_field": options.references_field,
        "max_new_tokens": options.max_new_tokens,
    }


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


def check_output(options: PredictArguments, keys: set[str]) -> None:
    """Raise `UserError` if the output exists and holds something else than answers with one of `keys`."""
    output = Path(options.output)
    if not output.exists():
        return
    summary = read_json(scores_file(output)) or {}
    if not summary.get("keys"):
        raise UserError(where=str(output), problem="the file exists, but has no answers.", fix="Give another output.")
    lost = [summary["models"].get(field, "a model") for key, field in summary["keys"].items() if key not in keys]
    if lost and not options.overwrite:
        raise UserError(
            where=str(output),
            problem=f"the file holds answers of {' and '.join(lost)}: another model, other rows or other settings.",
            fix="Give another output, name that model as compare, or set overwrite true.",
        )


def write_results(models: Mapping[str, PredictArguments], answered: Mapping[str, Answers], data: Source) -> None:
    """Write the answers of all models side by side, their scores and a page, and print a summary."""
    options, lines = models["prediction"], []
    for index, line in sorted(answered["prediction"].by_row.items()):
        texts = {field: answers.by_row.get(index, {}).get("prediction") for field, answers in answered.items()}
        lines.append(line if "error" in line else line | texts)
    output, metrics = Path(options.output), options.metric_names
    scored = score_lines(lines, list(models), metrics) if metrics else []
    if metrics and not scored:
        print0("Nothing is scored: no answered row has a right answer (see references_field).")
    summary: dict[str, Any] = {
        "rows": len(lines),
        "rows_left_out": sum("error" in line for line in lines),
        "models": {field: model.model_name_or_path for field, model in models.items()},
        "scores": {},
        "keys": {answers.key: field for field, answers in answered.items()},
        "rows_scored": len(scored),
    }
    for field in models if scored else ():
        of_rows = [line["scores"][field] for line in scored]
        summary["scores"][field] = {metric: fmean(scores[metric] for scores in of_rows) for metric in metrics}
    page = render_answers(lines, summary, lambda index: show_images(data[index], options))
    with writing(output):
        write_text(output, to_lines(lines))
        write_json(scores_file(output), summary)
        write_text(output.with_suffix(".html"), page)
    for answers in answered.values():
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
