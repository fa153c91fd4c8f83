"""The answers of a server to the rows of `vlm-tuning predict`: many requests at a time."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from tuning.commands.kept_answers import Answers, Line
from tuning.commands.predict_options import PredictArguments
from tuning.data.prompts import read_references
from tuning.data.sources import Row, Source
from tuning.errors import UserError
from tuning.exit_codes import on_interrupt_say
from tuning.serving.questions import ask_server, template_kwargs_of
from tuning.serving.server import Refused, Server, work_through


def answer_by_server(
    server: Server, options: PredictArguments, data: Source, open_rows: Sequence[int], answers: Answers
) -> None:
    """Add the server's answers to `open_rows`, in the order in which they come.

    Raises `UserError` where the server does not answer, and for a bad or refused row unless `on_bad_row` is skip.
    """
    bar = tqdm(total=len(open_rows), desc=f"{server.model} answers", unit="row")

    async def answer(client: Any, index: int) -> None:
        line = await answer_row(server, client, options, index, data[index])
        if "error" in line and options.on_bad_row != "skip":
            raise UserError(problem=line["error"], fix="Correct the row, or set on_bad_row skip.")
        answers.add([line])
        bar.update()

    async def answer_all() -> None:
        async with server.open() as client:
            at_once = min(options.requests_at_once, len(open_rows))
            await work_through(open_rows, lambda index: answer(client, index), at_once)

    def interrupted() -> str:
        return f"{len(answers.by_row)} answers are kept. Run the same command again to continue."

    with bar, on_interrupt_say(interrupted):
        asyncio.run(answer_all())


async def answer_row(server: Server, client: Any, options: PredictArguments, index: int, row: Row) -> Line:
    """The line of a row, with `error` where it is bad or the server refuses it."""
    line = {"index": index, "file": row.file, "row": row.number}
    try:
        # In a thread: other requests need not wait until its images are read and encoded.
        described, body = await asyncio.to_thread(describe, row, options)
    except UserError as error:
        return line | {"error": str(error)}
    try:
        reply = await server.ask(client, body, row.where, options.max_new_tokens)
    except Refused as error:
        return line | {"error": str(error)}
    return line | described | {"prediction": reply.text}


def describe(row: Row, options: PredictArguments) -> tuple[Line, dict[str, Any]]:
    """What the output says of a row, and the body of its request. Raises `UserError` for a bad row."""
    question = ask_server(row, options, template_kwargs_of(options))
    field = options.references_field
    line: Line = {"question": question.text, "reference": question.reference}
    line |= {"boxes": [asdict(box) for box in question.boxes]} if question.boxes else {}
    references = question.references if field is None else read_references(row.columns[field])
    return line | {"references": references}, question.body
