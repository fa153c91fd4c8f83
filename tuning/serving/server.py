"""A model behind an OpenAI-compatible API: which one it is, and its answers to requests."""

import asyncio
import importlib.util
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from tuning.config.options import ServerArguments
from tuning.errors import UserError, first_line

RETRIES = 5  # of a request that a busy or restarting server refused; the waits grow from half a second to eight
TO_CONNECT = 10.0  # seconds
NO_KEY = "none"  # servers without a key take any
REFUSED = (400, 413, 415, 422)  # the server does not take this request; others may be fine
VLLM, LLAMA_CPP = "vllm", "llama.cpp"
MARKS = {VLLM: ("/version", "version"), LLAMA_CPP: ("/props", "default_generation_settings")}


@dataclass(frozen=True)
class Token:
    """A token of an answer: its text, its log probability, and those of the likeliest tokens in its place, falling."""

    text: str
    logprob: float
    top: list[float]


@dataclass(frozen=True)
class Reply:
    """An answer without outer blanks.

    `prompt_tokens`: the number of tokens of the prompt. `prompt_ids`, `tokens`, `answer_ids`: if the server names them.
    """

    text: str
    prompt_tokens: int | None = None
    prompt_ids: list[int] | None = None
    tokens: list[Token] = field(default_factory=list)
    answer_ids: list[int] | None = None


class Refused(UserError):
    """The server does not take one request, and would not take it a second time."""


@dataclass(frozen=True)
class Server:
    """A `model` of the server at `url`, and the fields that every request has.

    `engine`: `VLLM`, `LLAMA_CPP`, or "" for any other. `models`: the names that the server lists.
    """

    url: str
    model: str
    engine: str = ""
    models: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0

    def open(self) -> Any:
        """A client for requests, to be closed after use. Raises `UserError` without the package openai."""
        check_package()
        from openai import AsyncOpenAI, Timeout

        timeout = Timeout(self.timeout, connect=min(TO_CONNECT, self.timeout))
        return AsyncOpenAI(base_url=self.url, api_key=find_key(), max_retries=RETRIES, timeout=timeout)

    async def ask(self, client: Any, body: Mapping[str, Any], where: str, max_new_tokens: int) -> Reply:
        """The greedy answer to one request. Raises `Refused`, or `UserError` where the server does not answer at all.

        `where`: the row, for errors. A field that `options` set to null is left out.
        """
        import openai

        fields = {"model": self.model, "temperature": 0, "max_tokens": max_new_tokens, **body, **self.options}
        if fields.get("tools") and self.engine == VLLM:  # the text as the model writes it, calls not taken out of it
            fields.setdefault("tool_choice", "none")
        fields = {name: value for name, value in fields.items() if value is not None}
        try:
            create = client.chat.completions.with_raw_response.create
            made = await create(model=fields.pop("model"), messages=fields.pop("messages"), extra_body=fields)
        except openai.APIStatusError as error:
            kind = Refused if error.status_code in REFUSED else UserError
            problem = f"the server answers {error.status_code}: {find_words(error.response)}."
            raise kind(where=where, problem=problem, fix=advise(error.status_code, self)) from error
        except openai.APIConnectionError as error:
            raise unreachable(self.url, error, where) from error
        try:
            return read_reply(made.http_response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                where=where,
                problem=f"{self.url} does not answer in the form of OpenAI's API ({type(error).__name__}).",
                fix="server_url is the address that ends in /v1 on most servers.",
            ) from error


def read_reply(made: Mapping[str, Any]) -> Reply:
    """The parts of an answer in JSON. Calls that the server has taken out of the text are put back as JSON."""
    choice = made["choices"][0]
    message = choice["message"]
    texts = [message.get("content") or ""]
    texts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    entries = (choice.get("logprobs") or {}).get("content") or ()
    tokens = [
        Token(
            one["token"],
            one["logprob"],
            sorted((top["logprob"] for top in one.get("top_logprobs") or ()), reverse=True),
        )
        for one in entries
    ]
    count = (made.get("usage") or {}).get("prompt_tokens")
    text = "\n".join(filter(None, texts)).strip()
    return Reply(text, count, made.get("prompt_token_ids"), tokens, choice.get("token_ids"))


async def work_through(items: Iterable[Any], work: Callable[[Any], Awaitable[None]], at_once: int) -> None:
    """Await `work(item)` for every item, `at_once` at a time. The first error cancels the others and is raised."""
    left = iter(items)

    async def take() -> None:
        for item in left:
            await work(item)

    tasks = [asyncio.create_task(take()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- which model ---


def connect(arguments: ServerArguments, url_option: str = "server_url", model_option: str = "model") -> Server:
    """The model that the arguments name, or the server's only one. Raises `UserError` where there is no such server.

    `url_option`, `model_option`: the names of the options, for errors.
    """
    check_package()
    url = (arguments.server_url or "").rstrip("/")
    models = list_models(url, url_option, arguments.request_timeout)
    if not arguments.model and len(models) != 1:
        listed = f"it has {', '.join(models)}" if models else "it does not list its models"
        raise UserError(where=url, problem=f"which model to ask? {listed}.", fix=f"Name one with --{model_option}.")
    return Server(
        url,
        arguments.model or models[0],
        find_engine(url),
        tuple(models),
        arguments.request_options,
        arguments.request_timeout,
    )


def list_models(url: str, option: str, seconds: float) -> list[str]:
    """The names that the server lists; none where it has no such list."""
    headers, timeout = {"Authorization": f"Bearer {find_key()}"}, httpx.Timeout(seconds, connect=TO_CONNECT)
    try:
        answer = httpx.get(f"{url}/models", headers=headers, timeout=timeout)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(url, error, option) from error
    if answer.status_code in (401, 403):
        raise UserError(
            where=f"{option} {url}",
            problem=f"the server answers {answer.status_code}: {find_words(answer)}.",
            fix="Set OPENAI_API_KEY.",
        )
    with suppress(ValueError, KeyError, TypeError):
        return [str(entry["id"]) for entry in answer.json()["data"]]
    return []


def find_engine(url: str) -> str:
    """The engine of a server, by a path that only this engine has, beside `/v1`; "" for others."""
    root = url.removesuffix("/v1")
    for engine, (path, key) in MARKS.items():
        with suppress(httpx.HTTPError, ValueError):
            found = httpx.get(root + path, timeout=TO_CONNECT)
            if found.status_code == 200 and key in found.json():
                return engine
    return ""


def is_url(name: str | None) -> bool:
    """Whether a name is the address of a server, and no folder or hub id."""
    return (name or "").startswith(("http://", "https://"))


def find_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or NO_KEY


def check_package() -> None:
    """Raise `UserError` if the client is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(problem="to ask a server needs openai.", fix='Install it: pip install "vlm-tuning[server]"')


# --- errors ---


def find_words(response: Any) -> str:
    """What a server says of an error on one line. `response`: of httpx, or of the client that openai uses."""
    text: Any = response.text
    with suppress(ValueError):
        found = response.json()
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
        text = found
    return " ".join(str(text).split())[:500].rstrip(". ") or "no reason given"


def advise(status: int, server: Server) -> str:
    """What to do about an answer with an error's status."""
    if status in (401, 403):
        return "Set OPENAI_API_KEY."
    if status == 404:
        known = f" The server lists {', '.join(server.models)}." if server.models else ""
        return f"Is {server.model} the model's name there, and {server.url} the address?{known}"
    if status in REFUSED:
        return ""
    return "Run the same command again when the server is well."


def unreachable(url: str, error: Exception, where: str) -> UserError:
    """The error of a server that does not answer at all, or not in time."""
    cause = error.__cause__ or error
    is_slow = type(cause).__name__ == "ReadTimeout"
    reason = "no answer in time" if is_slow else first_line(cause)
    fix = (
        "Raise request_timeout, or lower requests_at_once." if is_slow else "Start the server, or correct the address."
    )
    return UserError(where=where, problem=f"the server {url} cannot be reached: {reason}.", fix=fix)
