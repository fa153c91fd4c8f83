"""`vlm-tuning verify-serving`: compare what a server does with a few rows with what training does with them."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx
from accelerate import PartialState
from peft import PeftModel
from PIL import Image

from tuning.config.options import ModelSource, RowArguments, ServerArguments, option
from tuning.console import print0
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.data.from_config import check_config_name, make_encoder, open_path
from tuning.data.prompts import ask, ask_or_error, join_on_the_right, without_answer
from tuning.data.sources import Row
from tuning.errors import UserError, is_out_of_memory
from tuning.export.vllm import VLLM_NOTES
from tuning.model.answering import LoadedModel, load_answering
from tuning.model.greedy_trace import TOP, Trace, trace_answer
from tuning.model.lora import find_adapter, is_untrained
from tuning.serving.causes import Finder
from tuning.serving.chat_request import make_body
from tuning.serving.comparison import RowComparison, RowHere
from tuning.serving.prompt_ids import read_prompt_ids
from tuning.serving.questions import limit_images, template_kwargs_of
from tuning.serving.server import LLAMA_CPP, VLLM, Refused, Reply, Server, connect

BUILT_IN = "built-in"
HEADINGS = ("row", "pictures", "prompt", "picture tokens", "answer", "log probabilities")


@dataclass(frozen=True)
class VerifyArguments(RowArguments, ServerArguments, ModelSource):
    model_name_or_path: str = option("", "What the server should serve: a model or adapter.", required=True)
    server_url: str | None = option(None, "The server, such as http://localhost:8000/v1.", required=True)
    data_path: str | None = option(None, "Rows to compare on (default: built-in ones with and without a picture).")
    rows: int = option(4, "Compare on the first N rows.", minimum=1)
    max_new_tokens: int = option(16, "Longest answer in tokens.", minimum=1)


OPTIONS = VerifyArguments


@dataclass(frozen=True)
class Asked:
    """A row as training sees it, and the body of its request."""

    here: RowHere
    body: dict[str, Any]


def run(options: VerifyArguments) -> None:
    """Compare row by row, and print a table. Raises `UserError` with the first difference and its likely cause."""
    adapter = find_adapter(options.model_name_or_path)
    if adapter and is_untrained(adapter):
        raise changes_nothing(options, "every lora_B in it is 0.")
    server = connect(options)
    print0(f"{server.model} at {server.url}{f' ({server.engine})' if server.engine else ''}")
    with beside_the_server():
        loaded = load_answering(options, device=PartialState().device)
        encoder = make_encoder(
            options,
            loaded.processor,
            loaded.config,
            options.date_string,
            template_kwargs=options.chat_template_kwargs,
            tokens=loaded.tokens,
        )
        asked = [ask_here(row, loaded, encoder, options) for row in choose_rows(options, encoder)]
    if not asked:
        raise UserError(where="config", problem="no row can be used.", fix="Give data_path.")
    if all(one.here.base and one.here.base == one.here.answer for one in asked):
        raise changes_nothing(options, "base and adapter give the same log probabilities.")
    chat = encoder.chat
    if chat.added_end:
        print0(
            f"Warning: training writes {chat.added_end} after every answer, and the chat template does not. On a"
            " server, chats of several turns differ, unless you serve a template that writes it."
        )
    replies = asyncio.run(ask_server_for(server, asked, options.max_new_tokens))
    tokenizer = loaded.processor.tokenizer
    base = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    rows = [RowComparison(one.here, reply, tokenizer.decode) for one, reply in zip(asked, replies, strict=True)]
    print0(describe(rows))
    finder = Finder(
        server,
        options.model_name_or_path,
        loaded.model.dtype,
        tokenizer,
        adapter is not None,
        chat.added_end,
        VLLM_NOTES.get(type(base).__name__, "") if server.engine == VLLM else "",
    )
    if difference := finder.find(rows):
        raise UserError(where=server.url, problem=difference.problem, fix=difference.fix)
    if doubt := finder.find_doubt(rows):
        print0(f"Warning: {doubt}")
    print0(describe_success(rows, finder.tolerance))


@contextmanager
def beside_the_server() -> Iterator[None]:
    """Explain that the memory of the device has run out: a server on the same GPU takes most of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            problem="there is not enough memory for the model here. Is the server on the same GPU?",
            fix="Compare on the CPU: start the command with CUDA_VISIBLE_DEVICES= before it.",
        ) from error


def changes_nothing(options: VerifyArguments, reason: str) -> UserError:
    """The error of an adapter without any effect, whoever serves it."""
    return UserError(
        where=options.model_name_or_path,
        problem=f"the adapter changes nothing: {reason}",
        fix="Was it saved before it was trained, or is its base the merged model?",
    )


# --- rows ---


def choose_rows(options: VerifyArguments, encoder: Encoder) -> list[Row]:
    """The user's first rows, and built-in ones so that there are some with a picture and some without.

    A built-in row that the processor refuses is left out: some take none without a picture.
    """
    rows = list(read_rows(options)) if options.data_path else []
    if options.on_bad_row == "skip":
        rows = usable(rows, encoder)
    kinds = {has_pictures(row) for row in rows}
    ready = built_in_rows()[: 2 if encoder.chat.added_end else None]  # those of several turns cannot be equal
    added = [row for row in ready if has_pictures(row) not in kinds]
    return rows + usable(added, encoder)


def usable(rows: Sequence[Row], encoder: Encoder) -> list[Row]:
    """The rows that can be encoded."""
    return [row for row in rows if not isinstance(ask_or_error(row, encoder), UserError)]


def read_rows(options: VerifyArguments) -> Iterator[Row]:
    assert options.data_path is not None
    check_config_name(options, [options.data_path])
    data = open_path(options, options.data_path, options.dataset_split, needs_answers=False)
    return itertools.islice(data, options.rows)


def has_pictures(row: Row) -> bool:
    return bool(without_answer(row.format.read(row.columns, row.where, needs_answer=False)).images)


def built_in_rows() -> list[Row]:
    """Questions with and without a picture, whose left and right, top and bottom differ. Two have several turns."""
    picture = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((320, 200)) for turn in (0, 90, 180)])
    text = _user("Name three animals that live in the sea.")
    seen = _user([{"type": "image"}, {"type": "text", "text": "What do you see here? Answer in one sentence."}])
    reply = {"role": "assistant", "content": "Colours."}
    chats = [[text], [seen], [_user("Hello!"), reply, text], [seen, reply, _user("Which ones?")]]
    return [
        Row({"messages": messages, "images": [picture] if messages[0] is seen else []}, BUILT_IN, number)
        for number, messages in enumerate(chats)
    ]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


# --- both sides ---


def ask_here(row: Row, loaded: LoadedModel, encoder: Encoder, options: VerifyArguments) -> Asked:
    """Encode a row as training does, let the model answer, and write the request. Raises `UserError` for a bad row."""
    whole = encoder.ground(row, row.format.read(row.columns, row.where, needs_answer=False)).conversation
    asked = limit_images(row, without_answer(whole), encoder.max_images)
    question, model = ask(row, encoder), loaded.model
    batch = join_on_the_right([question.sample], probe_collator(encoder.processor))

    def trace() -> Trace:
        return trace_answer(
            model,
            encoder.processor.tokenizer,
            batch,
            max_new_tokens=options.max_new_tokens,
            end_of_turn=encoder.chat.end_of_turn,
        )

    here = RowHere(
        row.where,
        len(asked.images),
        question.sample.sequence["input_ids"].tolist(),
        encoder.image_token_id,
        trace(),
    )
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        here = replace(here, base=trace() if loaded.adapter else None)
    return Asked(here, make_body(asked, row, encoder.image_rules, template_kwargs_of(options)))


async def ask_server_for(server: Server, asked: Sequence[Asked], max_new_tokens: int) -> list[Reply]:
    """The server's answers with all that it tells about them. A field that it refuses is left out."""
    probes = {"logprobs": True, "top_logprobs": TOP} | ({"return_token_ids": True} if server.engine == VLLM else {})
    replies = []
    async with server.open() as client:
        for one in asked:
            name = one.here.name
            try:
                reply = await server.ask(client, one.body | probes, name, max_new_tokens)
            except Refused:
                reply = await server.ask(client, one.body, name, max_new_tokens)
                probes = {}
            if server.engine == LLAMA_CPP and not one.here.pictures:
                with suppress(httpx.HTTPError, KeyError):
                    reply = replace(reply, prompt_ids=read_prompt_ids(server.url, one.body, server.timeout))
            replies.append(reply)
    return replies


# --- report ---


def describe(rows: Sequence[RowComparison]) -> str:
    """A table with a line for each row: what is here, and what the server has."""
    table = [HEADINGS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)


def describe_success(rows: Sequence[RowComparison], tolerance: float) -> str:
    """What is equal, as far as the server tells."""
    named = all(row.served.prompt_ids is not None for row in rows)
    tokens = "prompt tokens" if named else "number of prompt tokens"
    closeness = f", with log probabilities within {tolerance:g}" if all(row.gap() for row in rows) else ""
    return f"Done: on these rows the server has the same {tokens} and the same answers as training{closeness}."


def _cells(row: RowComparison) -> tuple[str, ...]:
    gap = row.gap()
    return (
        row.here.name,
        str(row.here.pictures),
        _both(*row.prompt_lengths)
        + ("" if row.served.prompt_ids is None else " tokens" if row.same_prompt else " differ"),
        _both(*row.picture_tokens),
        "the same" if row.same_answer else "differs",
        "not given" if gap is None else f"differ by {gap.largest:.1g}",
    )


def _both(here: int, there: int | None) -> str:
    return f"{here} / {'?' if there is None else there}"
