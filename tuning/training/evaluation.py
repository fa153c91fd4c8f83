"""Answers of a model by generation: for predictions, and during training for scores and for the report."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm
from transformers import TrainerCallback

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.data.collator import Collator
from tuning.data.dummy_samples import dummy_image_sample
from tuning.data.encode import Encoder, Sample
from tuning.data.from_config import TrainingData, source_of
from tuning.data.images import thumbnail
from tuning.data.prompts import Question, ask, join_on_the_right, right_answers
from tuning.data.row_errors import TOO_LONG
from tuning.data.sources import Row
from tuning.distributed.processes import Processes
from tuning.distributed.zero3 import gathered, weights_outside_layers
from tuning.errors import UserError, describe_failure, try_optional
from tuning.files import SAMPLES_FILE, read_lines, to_lines, write_text
from tuning.metrics import check_references, mean_scores, score_rows
from tuning.model.generate import generate_texts
from tuning.training.step_guard import StepState

Line = dict[str, Any]  # a row's `file`, `row`, `question`, `reference` and `prediction`


def answer(
    model: Any,
    samples: Sequence[Sample],
    encoder: Encoder,
    collator: Collator,
    *,
    max_new_tokens: int,
    synced_gpus: bool = False,
) -> list[str]:
    """Greedy answers to a batch of prompts. `synced_gpus`: see `generate_texts`."""
    texts = generate_texts(
        model,
        encoder.processor.tokenizer,
        join_on_the_right(samples, collator),
        max_new_tokens=max_new_tokens,
        end_of_turn=encoder.chat.end_of_turn,
        synced_gpus=synced_gpus,
    )
    return texts[: len(samples)]  # the dummy image sample of the collator, if it has one, comes last


def share_out(rows: Sequence[Any], batch_size: int, *, rank: int, world: int) -> list[Sequence[Any]]:
    """The batches of process `rank` of `world`. Every process gets as many: some at the end may be empty."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches += [[]] * (-len(batches) % world)
    return batches[rank::world]


class CannotAnswer(UserError):
    """The model cannot write answers on this process or, where `cause` is None, on another one."""

    def __init__(self, cause: Exception | None):
        reason = describe_failure(cause) if cause else "another process failed"
        super().__init__(
            problem=f"This model cannot answer by generation here ({reason}).",
            fix="Set eval_generate_rows 0 to train without such scores.",
        )


@dataclass(frozen=True)
class GenerationEvaluator:
    """Answers rows with the model in training, on all processes, and scores the answers.

    `rows`: the validation rows to answer at every evaluation, for scores in `metrics`. `synced_gpus`: the processes
    hold shards of the weights, so they must generate together.
    """

    encoder: Encoder
    collator: Collator
    processes: Processes
    rows: list[Row]
    metrics: list[str]
    max_new_tokens: int
    batch_size: int
    skip_bad_rows: bool
    synced_gpus: bool
    show_progress: bool

    def score(self, lines: Sequence[Line]) -> dict[str, float]:
        """The mean scores of answers; none where there are no answers."""
        if not lines:
            return {}
        answers, references = [line["prediction"] for line in lines], [[line["reference"]] for line in lines]
        return mean_scores(score_rows(self.metrics, answers, references))

    def answer_rows(self, rows: Sequence[Row], model: nn.Module) -> list[Line]:
        """A line for every row that can be used, in order and on every process. Each process answers its share.

        Raises `UserError` on all processes where one meets a bad row, and `CannotAnswer` where the model of one fails.
        """
        processes, lines = self.processes, list[tuple[int, Line]]()
        model = processes.accelerator.unwrap_model(model)
        batches = share_out(list(enumerate(rows)), self.batch_size, rank=processes.rank, world=processes.number)
        hidden = processes.rank > 0 or not self.show_progress
        with answering_mode(model), processes.accelerator.autocast():
            for batch in tqdm(batches, desc="answering", unit="batch", leave=False, disable=hidden):
                asked, error = list[tuple[int, Question]](), None
                try:
                    asked = list(self._ask(batch))
                except UserError as found:
                    error = found
                processes.raise_on_all_ranks(error)
                texts = self._answer_on_all_ranks(model, [question.sample for _, question in asked])
                lines += [(n, _describe(question, text)) for (n, question), text in zip(asked, texts, strict=False)]
        return [line for _, line in sorted(gather_object(lines), key=lambda entry: entry[0])]

    def _answer_on_all_ranks(self, model: nn.Module, samples: list[Sample]) -> list[str]:
        if self.synced_gpus and not samples:  # the others need this process to generate, too
            samples = [dummy_image_sample(self.encoder)]

        def generate() -> list[str]:
            limit, synced = self.max_new_tokens, self.synced_gpus
            return answer(model, samples, self.encoder, self.collator, max_new_tokens=limit, synced_gpus=synced)

        attempt = try_optional(generate if samples else list)
        if self.processes.any_failed(attempt.error, together=self.synced_gpus):
            raise CannotAnswer(attempt.error)
        return attempt.value or []

    def _ask(self, batch: Sequence[tuple[int, Row]]) -> Iterator[tuple[int, Question]]:
        """The questions of rows that can be used and that have an answer to compare with."""
        for number, row in batch:
            try:
                question = ask(row, self.encoder)
            except UserError as error:
                if self.skip_bad_rows or (error.kind == TOO_LONG and self.encoder.overlong_rows != "error"):
                    continue
                raise
            if question.reference is not None:
                yield number, question


class SampleLog(TrainerCallback):
    """Writes the model's answers to `rows` to `sample_predictions.jsonl`, for the report.

    The model answers them before and after training. Answers at evaluations are added by `add`. The first line of a row
    has its images.
    """

    def __init__(self, evaluator: GenerationEvaluator, rows: list[Row], folder: Path, step: StepState):
        self.evaluator, self.rows, self.step = evaluator, rows, step
        self.file = folder / SAMPLES_FILE
        self._written: set[tuple[int, str]] = set()  # step and place of each line

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and (self.rows or self.evaluator.rows):
            self._keep_lines_until(state.global_step)
        if not state.global_step:
            self._answer(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._answer(model, state.global_step)

    def _keep_lines_until(self, step: int) -> None:
        kept = [line for line in read_lines(self.file) if line["step"] <= step] if step else []
        self._written = {(line["step"], _place(line)) for line in kept}
        write_text(self.file, to_lines(kept))

    def _answer(self, model: nn.Module, step: int) -> None:
        if self.step.stop_reason:
            return
        try:
            self.add(self.evaluator.answer_rows(self.rows, model), step)
        except CannotAnswer as error:
            print0(f"The report shows no samples. {error.problem}")
            self.rows = []

    def add(self, lines: Sequence[Line], step: int) -> None:
        """Write those of `lines` that belong to `rows`, once a step."""
        if self.evaluator.processes.rank > 0:
            return
        rows = {row.where: row for row in self.rows}
        new = [line for line in lines if _place(line) in rows and (step, _place(line)) not in self._written]
        try:
            written = [{"step": step, **line, **self._images(rows[_place(line)])} for line in new]
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(to_lines(written))
        except (OSError, UserError) as error:  # only this process writes: the others continue
            print0(f"The samples of the report cannot be written: {error}")
        self._written |= {(step, _place(line)) for line in new}

    def _images(self, row: Row) -> dict[str, list[str]]:
        if any(row.where == place for _, place in self._written):
            return {}
        encoder = self.evaluator.encoder
        return {"images": [thumbnail(image) for image in encoder.open_images(encoder.prepare(row))]}


@contextmanager
def answering_mode(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and the compiler, which would compile again for every length.

    FSDP and ZeRO-3 gather for `generate`.
    """
    was_training = model.training
    model.eval()
    if "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")
    try:
        with torch.compiler.set_stance("force_eager"), gathered(list(weights_outside_layers(model))):
            yield
    finally:
        model.train(was_training)


def _describe(question: Question, text: str) -> Line:
    return {
        "file": question.file,
        "row": question.number,
        "question": question.text,
        "reference": question.reference,
        "prediction": text,
    }


def _place(line: Line) -> str:
    return f"{line['file']}, row {line['row']}"


def read_first_rows(data: TrainingData, number: int) -> list[Row]:
    """The first rows of the validation data, or of the training data where there is none."""
    source = source_of(data.train if data.validation is None else data.validation)
    return [row for row in itertools.islice(source, number) if not isinstance(row, UserError)]


def make_evaluator(
    config: RunConfig, data: TrainingData, processes: Processes, *, synced_gpus: bool
) -> GenerationEvaluator:
    """The evaluator of a run. Raises `UserError` where `eval_metrics` cannot score the rows' right answers."""
    answers, rows = config.answers, list[Row]()
    if answers.eval_generate_rows and data.validation is not None:
        rows = read_first_rows(data, answers.eval_generate_rows)
        check_references(answers.metric_names, right_answers(rows))
    return GenerationEvaluator(
        data.encoder,
        data.collator,
        processes,
        rows=rows,
        metrics=answers.metric_names,
        max_new_tokens=answers.eval_max_new_tokens,
        batch_size=config.training.eval_batch_size,
        skip_bad_rows=config.data.on_bad_row == "skip",
        synced_gpus=synced_gpus,
        show_progress=not config.training.disable_tqdm,
    )
