"""A rendered text and its images → the processor's tensors, with the place of each token in the text."""

import copy
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuning.data.chat_template import ChatFormat
from tuning.data.token_spans import Change, Span, find_changes, overlaps, reported_changes, undo_changes
from tuning.errors import UserError, try_optional

PLACES = "offset_mapping"  # of a row's tensors: the characters of each token in the rendered text, `[1, T, 2]`
IMAGE_TOKENS = "image_tokens"  # of a row's tensors: whether a token stands for a part of an image, `[1, T]`
EXPANSIONS = "text_replacement_offsets"  # of a processor's output: how it expanded the image placeholders
NOT_PLACED = "tokens that cannot be located"  # the kind of an error


@dataclass(frozen=True)
class Reading:
    """What a processor gave its tokenizer, and what came back: `ids` `[T]`, and their `offsets` `[T, 2]` in `text`."""

    text: str
    ids: Any
    offsets: Any


@dataclass(frozen=True)
class Processed:
    """A processor's tensors with the places of its tokens, the changes it made, and whether it reported them all."""

    inputs: dict[str, Any]
    changes: list[Change]
    reported: bool


class RowProcessor:
    """Runs a model's processor on one row, and finds the place of each of its tokens in the row's text.

    Processors rewrite the text: they expand the placeholders of images, and some insert more. Not all of them report
    it, or give offsets. So the tokenizer that they call is a copy that keeps the text it is given. What the processor
    reports is used where it makes that text. Else we find the parts of our text in it. Where they are not found, or
    could be in several places, a `UserError` says so.

    `takes_prompts`: the processor is meant for prompts only. It ends the text for an answer to follow, or the model
    sees the whole text both ways (the processor then takes the answer apart, as `suffix`).
    """

    def __init__(self, processor: Any, chat: ChatFormat, options: Mapping[str, Any]):
        self.processor, self.chat = processor, chat
        self.image_token_id: int | None = getattr(processor, "image_token_id", None)
        self._placeholder = chat.image_token or self._find_placeholder()
        self._options = {f"return_{EXPANSIONS}": True, **options}

    def process(
        self, text: str, images: Sequence[Image.Image], *, prompt_end: int | None = None, needed: Sequence[Span] = ()
    ) -> dict[str, Any]:
        """The processor's tensors for one rendered text, with `PLACES` and `IMAGE_TOKENS`.

        The processor gets the text up to `prompt_end`, if given, and the tokens of the rest are added. `needed`: spans
        whose tokens must be found.
        """
        escaper, tokenizer = self.chat.escaper, self.processor.tokenizer
        escaped = escaper.is_escaped(text)
        if escaped:
            tokenizer = escaper.escaped_tokenizer
        if prompt_end is None:
            inputs = self._read(tokenizer, text, images, needed).inputs
        else:
            inputs = self._read(tokenizer, text[:prompt_end], images).inputs
            inputs = _append(inputs, tokenizer, text, prompt_end)
        return escaper.unescape(inputs, text) if escaped else inputs

    def tokenizer_options(self, text: str) -> dict[str, bool]:
        """Options that keep the tokenizer from adding a second first token, where the template writes one."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    @functools.cached_property
    def added_start(self) -> str:
        """See `find_added_start`."""
        return find_added_start(self.processor.tokenizer, self.question([]))

    def question(self, images: Sequence[Image.Image], question: str = "?") -> str:
        """The text of a prompt of `images` and a question."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        return self.chat.generation_prompt([{"role": "user", "content": content}])

    @functools.cached_property
    def takes_prompts(self) -> bool:
        """See the class."""
        has_suffix = "suffix" in inspect.signature(type(self.processor).__call__).parameters
        ends = [((len(text), len(text)), processed.changes[-1:]) for text, processed in self._probes]
        return has_suffix or any(changes and changes[0][0] == end for end, changes in ends)

    @functools.cached_property
    def reports_all(self) -> bool:
        """Whether the processor reports all that it changes in a text."""
        return bool(self._probes) and all(processed.reported for _, processed in self._probes)

    @functools.cached_property
    def placeholders(self) -> re.Pattern:
        """What a rendered text has for an image: it need not be the image token."""
        changes = ((text, old) for text, processed in self._probes for old, _ in processed.changes)
        found = {text[slice(*old)] for text, old in changes} - {""}
        return re.compile("|".join(map(re.escape, sorted(found))) or r"(?!)")

    @functools.cached_property
    def _probes(self) -> list[tuple[str, Processed]]:
        """Short prompts, and what the processor makes of them. It may refuse one without an image."""
        tokenizer, probes = self.processor.tokenizer, []
        for images in ([], [Image.new("RGB", (32, 32))]):
            text = self.question(images)
            attempt = try_optional(functools.partial(self._read, tokenizer, text, images), catch_user_errors=True)
            if attempt.value is not None:
                probes.append((text, attempt.value))
        return probes

    @functools.cached_property
    def _takes_rows(self) -> bool:
        """Whether the processor takes the images of a row as a list of their own, as `apply_chat_template` gives them.

        LLaVA-OneVision's cuts pictures into tiles only where a row has a single one. GOT-OCR's refuses lists in lists.
        """
        pair = [Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32))]
        row = try_optional(lambda: self.question(pair), catch_user_errors=True)
        return row.error is None and not try_optional(lambda: self.processor(text=[row.value], images=[pair])).error

    def _find_placeholder(self) -> str:
        """The token of `image_token_id`, for a processor that does not name its placeholder."""
        token = self.image_token_id
        return self.processor.tokenizer.convert_ids_to_tokens(token) or "" if token is not None else ""

    def _read(self, tokenizer: Any, text: str, images: Sequence[Image.Image], needed: Sequence[Span] = ()) -> Processed:
        """Let the processor process `text` as it is, with `tokenizer`."""
        processor, (listener, readings) = copy.copy(self.processor), listen(tokenizer)
        processor.tokenizer = listener
        made = self._call(processor, text, images)
        # The tokenizer's own conversion to tensors walks over every number in Python.
        inputs = {
            name: value if torch.is_tensor(value) else torch.from_numpy(np.asarray(value))
            for name, value in made.items()
            if name not in (EXPANSIONS, PLACES)
        }
        ids = inputs["input_ids"][0].numpy()
        reading = next((found for found in readings if _is_reading_of(found, made["input_ids"], ids)), None)
        if reading is None:
            raise self._not_placed("it makes its tokens from other texts than the whole one")
        reported = reported_changes((made.get(EXPANSIONS) or [[]])[0], text, reading.text)
        changes = find_changes(text, reading.text, self._placeholder, needed) if reported is None else reported
        if changes is None:
            raise self._not_placed("it rewrites the text, and does not report how")
        offsets = np.asarray(reading.offsets).reshape(-1, 2)
        image_tokens = overlaps(offsets, [new for old, new in changes if old[0] < old[1]])
        if self.image_token_id is not None:
            image_tokens |= ids == self.image_token_id
        places = torch.from_numpy(undo_changes(offsets, changes))
        inputs |= {PLACES: places[None], IMAGE_TOKENS: torch.from_numpy(image_tokens)[None]}
        return Processed(inputs, changes, reported is not None)

    def _call(self, processor: Any, text: str, images: Sequence[Image.Image]) -> Any:
        """Call the processor: with our options, or without them if it does not know them."""
        pictures = list(images)
        row = {"text": [text], "images": ([pictures] if len(pictures) > 1 and self._takes_rows else pictures) or None}
        options = {"images_kwargs": {"return_tensors": "pt"}, **self._options, **self.tokenizer_options(text)}
        attempt = try_optional(lambda: processor(**row, **options))
        if attempt.error is None:
            return attempt.value
        plain = try_optional(lambda: processor(**row, return_tensors="pt"))
        if plain.error is not None:
            raise attempt.error
        return plain.value

    def _not_placed(self, reason: str) -> UserError:
        return UserError(
            where="model_name_or_path",
            problem=f"the answers cannot be located in what {type(self.processor).__name__} makes of a row: {reason}.",
            fix="Choose another model.",
            kind=NOT_PLACED,
        )


def listen(tokenizer: Any) -> tuple[Any, list[Reading]]:
    """A copy of a tokenizer, and a list to which it adds what it is given and makes of it."""
    kind: Any = type(tokenizer)
    copied: Any = object.__new__(_listening_class(kind))
    readings = list[Reading]()
    copied.__dict__.update(tokenizer.__dict__, readings=readings)
    return copied, readings


@functools.cache
def _listening_class(stock: Any) -> type:
    return type(stock.__name__, (stock,), {"__call__": _tokenize, "stock_class": stock})


def _tokenize(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
    """Tokenize as the stock class does, and keep a single text with its tokens and their offsets."""
    options.pop(f"return_{EXPANSIONS}", None)  # meant for the processor
    wants_offsets = options.pop("return_offsets_mapping", False)
    made = self.stock_class.__call__(self, text, *args, return_offsets_mapping=True, **options)
    offsets = made[PLACES] if wants_offsets else made.pop(PLACES)
    is_single = isinstance(text, str)
    if is_single or (isinstance(text, list | tuple) and len(text) == 1 and isinstance(text[0], str)):
        self.readings.append(Reading(text if is_single else text[0], made["input_ids"], offsets))
    return made


def _is_reading_of(reading: Reading, made: Any, ids: np.ndarray) -> bool:
    """Whether the processor returned the ids of a reading: as they were (`made`), or changed into the array `ids`."""
    return reading.ids is made or np.array_equal(np.asarray(reading.ids).reshape(-1), ids)


def find_added_start(tokenizer: Any, prompt: str) -> str:
    """The first token, where the tokenizer adds it to a rendered `prompt` that does not begin with it; else ""."""
    bos = tokenizer.bos_token
    adds = bool(bos) and tokenizer("?")["input_ids"][:1] == [tokenizer.bos_token_id]
    return bos if adds and not prompt.startswith(bos) else ""


def _append(inputs: dict[str, Any], tokenizer: Any, text: str, start: int) -> dict[str, Any]:
    """The tensors of a prompt with the tokens of an answer, `text` from `start` on, which the model reads in turn."""
    made = tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True)
    ids, length = torch.tensor([made["input_ids"]]), inputs["input_ids"].shape[1]
    added = {"input_ids": ids, PLACES: torch.tensor([made[PLACES]]) + start}
    for name in ("attention_mask", "token_type_ids"):  # of a prefix, these are 0
        added[name] = torch.ones_like(ids)
    joined = {}
    for name, value in inputs.items():
        if value.shape[:2] == (1, length):
            more = added[name] if name in added else value.new_zeros(1, ids.shape[1], *value.shape[2:])
            value = torch.cat([value, more.to(value.dtype)], dim=1)
        joined[name] = value
    return joined
