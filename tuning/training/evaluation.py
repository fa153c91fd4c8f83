"""Rows → answers of a model by generation: for predictions, and during training for scores and the report."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.data.collator import Collator
from tuning.data.dataset import EncodedRows, StreamedRows
from tuning.data.dummy_samples import dummy_image_sample
from tuning.data.encode import TOO_LONG, Encoder, Sample
from tuning.data.images import thumbnail
from tuning.data.prompts import Question, ask, join_on_the_right, right_answers
from tuning.data.sources import Row
from tuning.distributed.processes import Processes
from tuning.errors import UserError, is_out_of_memory
from tuning.files import SAMPLES_FILE, read_lines, to_lines, write_text
from tuning.metrics import check_right_answers, mean_scores, score_rows
from tuning.model.generate import generate_texts

CANNOT_GENERATE = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


def answer(
    model: Any,
    samples: Sequence[Sample],
    encoder: Encoder,
    collator: Collator,
    *,
    max_new_tokens: int,
    together: bool = False,
) -> list[str]:
    """Greedy answers to a batch of prompts. `together`: see `generate_texts`."""
    texts = generate_texts(
        model,
        encoder.processor.tokenizer,
        join_on_the_right(samples, collator),
        max_new_tokens=max_new_tokens,
        end_of_turn=encoder.chat.end_of_turn,
        together=together,
    )
    return texts[: len(samples)]  # the collator's filler, if it has one, comes last


def share_out(rows: Sequence[Any], batch_size: int, *, rank: int, world: int) -> list[Sequence[Any]]:
    """The batches of process `rank` of `world`; some at the end may be empty, so that all have as many."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches += [[]] * (-len(batches) % world)
    return batches[rank::world]


class CannotAnswer(UserError):
    """A model that cannot write answers, on this process or, where `cause` is None, on another one."""

    def __init__(self, cause: Exception | None):
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}" if cause else "another process failed"
        super().__init__(problem=f"This model cannot answer by generation here ({reason}).")


@dataclass
class GenerationEvaluator:
    """Lets the model that is trained answer rows.

    `rows`: those to answer at every evaluation, scored by `metrics`. `samples`: those to answer before and after
    training, for the report; with their pictures they are kept in `folder`.
    """

    encoder: Encoder
    collator: Collator
    rows: list[Row]
    samples: list[Row]
    metrics: list[str]
    max_new_tokens: int
    batch_size: int
    skip_bad_rows: bool
    folder: Path
    show_progress: bool = True
    _kept: set[tuple[int, str]] = field(default_factory=set)

    def begin(self, step: int, *, first: bool) -> None:
        """On the `first` process, leave in the file what was answered up to `step`."""
        if not first or not (self.rows or self.samples):
            return
        file = self.folder / SAMPLES_FILE
        kept = [line for line in read_lines(file) if line["step"] <= step] if step else []
        self._kept = {(line["step"], _place(line)) for line in kept}
        write_text(file, to_lines(kept))

    def examine(self, model: nn.Module, processes: Processes, step: int, *, together: bool) -> dict[str, float]:
        """The mean scores of the answers to `rows`, the same on every process; see `answer_rows`."""
        lines = self.answer_rows(self.rows, model, processes, together=together)
        self._keep(lines, step, processes)
        if not lines:
            return {}
        answers, references = [line["prediction"] for line in lines], [[line["reference"]] for line in lines]
        return mean_scores(score_rows(self.metrics, answers, references))

    def answer_samples(self, model: nn.Module, processes: Processes, step: int, *, together: bool) -> None:
        """Let the model answer `samples` and write down what it says. A model that cannot has none from now on."""
        try:
            lines = self.answer_rows(self.samples, model, processes, together=together)
        except CannotAnswer as error:
            print0(f"The report shows no samples. {error}")
            self.samples = []
        else:
            self._keep(lines, step, processes)

    def _keep(self, lines: list[dict[str, Any]], step: int, processes: Processes) -> None:
        """Write down those of `lines` that are of `samples`, once a step; a row's pictures once."""
        if processes.rank > 0:
            return
        rows = {row.where: row for row in self.samples}
        new = [line for line in lines if _place(line) in rows and (step, _place(line)) not in self._kept]
        try:
            written = [{"step": step, **line, **self._pictures(rows[_place(line)])} for line in new]
            with open(self.folder / SAMPLES_FILE, "a", encoding="utf-8") as file:
                file.write(to_lines(written))
        except (OSError, UserError) as error:  # on this process alone: the others go on
            print0(f"The samples of the report cannot be kept: {error}")
        self._kept |= {(step, _place(line)) for line in new}

    def _pictures(self, row: Row) -> dict[str, list[str]]:
        if any(row.where == place for _, place in self._kept):
            return {}
        return {"images": [thumbnail(image) for image in self.encoder.open_images(self.encoder.prepare(row))]}

    def answer_rows(
        self, rows: Sequence[Row], model: nn.Module, processes: Processes, *, together: bool
    ) -> list[dict[str, Any]]:
        """A line for every row that can be used, in order and on every process.

        All processes answer their share at the same time; `together`: from weights that they hold together. Raises
        `UserError` on all of them where one meets a bad row, `CannotAnswer` where the model of one fails.
        """
        lines: list[tuple[int, dict[str, Any]]] = []
        batches = share_out(list(enumerate(rows)), self.batch_size, rank=processes.rank, world=processes.number)
        hidden = processes.rank > 0 or not self.show_progress
        with answering_mode(model):
            for batch in tqdm(batches, desc="answering", unit="batch", leave=False, disable=hidden):
                asked, error = list[tuple[int, Question]](), None
                try:
                    asked = list(self._ask(batch))
                except UserError as found:
                    error = found
                processes.raise_on_all_ranks(error)
                samples = [question.sample for _, question in asked]
                samples = samples or ([dummy_image_sample(self.encoder)] if together else [])
                texts, failure = self._try_to_answer(model, samples, together=together)
                if processes.share([failure is not None]).any():
                    raise CannotAnswer(failure)
                lines += [(n, _describe(question, text)) for (n, question), text in zip(asked, texts, strict=False)]
        return [line for _, line in sorted(gather_object(lines), key=lambda entry: entry[0])]

    def _try_to_answer(
        self, model: nn.Module, samples: list[Sample], *, together: bool
    ) -> tuple[list[str], Exception | None]:
        if not samples:
            return [], None
        limit = self.max_new_tokens
        try:
            texts = answer(model, samples, self.encoder, self.collator, max_new_tokens=limit, together=together)
        except CANNOT_GENERATE as error:
            if is_out_of_memory(error):
                raise
            return [], error
        return texts, None

    def _ask(self, batch: Sequence[tuple[int, Row]]) -> Iterator[tuple[int, Question]]:
        """The questions of rows that can be used, and that have an answer to compare with."""
        for number, row in batch:
            try:
                question = ask(row, self.encoder)
            except UserError as error:
                if self.skip_bad_rows or (error.kind == TOO_LONG and self.encoder.overlong_rows != "error"):
                    continue
                raise
            if question.reference is not None:
                yield number, question


@contextmanager
def answering_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without compiling anew for every length; under FSDP, `generate` counts as a forward."""
    was_training = model.training
    model.eval()
    if "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def _describe(question: Question, text: str) -> dict[str, Any]:
    return {
        "file": question.file,
        "row": question.number,
        "question": question.text,
        "reference": question.reference,
        "prediction": text,
    }


def _place(line: dict[str, Any]) -> str:
    return f"{line['file']}, row {line['row']}"


def make_examiner(
    config: RunConfig, encoder: Encoder, collator: Collator, rows: EncodedRows | StreamedRows
) -> GenerationEvaluator:
    """What answers the first rows by generation: those of the validation data, where there are any."""
    answers, source = config.answers, rows.stream if isinstance(rows, StreamedRows) else rows.source
    asked = answers.eval_generate_rows if config.data.validation_data_path else 0
    most = max(asked, answers.report_samples)
    first = [row for row in itertools.islice(source, most) if not isinstance(row, UserError)]
    if asked:
        check_right_answers(answers.metric_names, right_answers(first))
    return GenerationEvaluator(
        encoder,
        collator,
        rows=first[:asked],
        samples=first[: answers.report_samples],
        metrics=answers.metric_names,
        max_new_tokens=answers.eval_max_new_tokens,
        batch_size=config.training.eval_batch_size,
        skip_bad_rows=config.data.on_bad_row == "skip",
        folder=Path(config.training.output_dir),
        show_progress=not config.training.disable_tqdm,
    )
