"""What to tell a user whose columns fit no format that we read."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tuning.data.json_files import parse_list
from tuning.errors import UserError

QUESTIONS = ("question", "query", "instruction", "prompt", "user", "human", "problem", "input", "text_input")
ANSWERS = ("answer", "response", "reply", "output", "completion", "assistant", "gpt", "target", "label", "caption")
IMAGES = ("image", "images", "img", "picture", "photo", "file_name", "filename", "path")
NO_TEXT_COLUMN = "no column of messages"  # the kind of an error
IMAGE_MARK = "<image>"

Rows = Sequence[Mapping[str, Any]]


def no_text_column(names: Sequence[str], first_rows: Rows, text_field: str, *, where: str, path: str) -> UserError:
    """The error of a file without the column `text_field`. It names the column, or the command that helps."""
    problem = f"there is no column '{text_field}', only: {', '.join(names)}."
    if found := [name for name in names if any(_is_conversation(row.get(name)) for row in first_rows)]:
        return UserError(where=where, problem=problem, fix=f"Set dataset_text_field {found[0]}.")
    if text_field != "messages":
        return UserError(where=where, problem=problem, fix="Set dataset_text_field.")
    command = f"vlm-tuning convert {shlex.quote(path)} {shlex.quote(_converted_name(path))}"
    answer, question = _guess(ANSWERS, names), _guess(QUESTIONS, names)
    command += f" --question_column {question or '…'} --answer_column {answer or '…'}"
    if image := find_image_column(names, first_rows) or _guess(IMAGES, names):
        command += f" --image_column {shlex.quote(image)}"
    fix = f"Write the format that training reads: {command}"
    return UserError(where=where, problem=problem, fix=fix, kind=NO_TEXT_COLUMN)


def _converted_name(path: str) -> str:
    name = Path(path).name
    for suffix in (".gz", Path(name.removesuffix(".gz")).suffix):
        name = name.removesuffix(suffix) if suffix else name
    return f"{name}_converted.jsonl"


def _guess(usual: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that has a usual name, or else one with it as a word, also in the plural."""
    words = {name: [word.removesuffix("s") for word in re.split(r"[\W_]+", name.lower())] for name in names}
    for is_whole in (True, False):
        for word in usual:
            for name in names:
                if name.lower() in (word, f"{word}s") if is_whole else word in words[name]:
                    return shlex.quote(name)
    return None


def check_needs_no_image(
    names: Sequence[str], first_rows: Rows, text_fields: Sequence[str], image_field: str, where: str
) -> None:
    """Raise `UserError` where rows without the column `image_field` seem to have images."""
    problem = f"there is no column '{image_field}', only: {', '.join(names)}."
    others = [name for name in names if name not in text_fields]
    if found := find_image_column(others, first_rows):
        raise UserError(where=where, problem=problem, fix=f"Set dataset_image_field {found}.")
    marked = 0
    for row in first_rows:
        values = [parse_list(row[field]) or row[field] for field in text_fields]
        messages = [m for value in values if isinstance(value, (list, tuple)) for m in value if isinstance(m, dict)]
        if any(message.get(key) for message in messages for key in ("images", "image")):
            raise UserError(
                where=where,
                problem="messages have images under a key of their own, which are not read.",
                fix="Put all images of a row into a column 'images', and one <image> into the text for each of them.",
            )
        parts = [part for m in messages if isinstance(m.get("content"), (list, tuple)) for part in m["content"]]
        if any(isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in parts):
            raise UserError(where=where, problem=f"{problem} A message has an image.", fix="Set dataset_image_field.")
        marked += IMAGE_MARK in str(values)
    if marked * 2 > len(first_rows):
        raise UserError(
            where=where,
            problem=f"{problem} The texts have {IMAGE_MARK}.",
            fix="Set dataset_image_field, or add a column 'images' that is empty, if it is an ordinary word.",
        )


def find_image_column(names: Sequence[str], first_rows: Rows) -> str | None:
    """The column whose first values look like images: encoded, or names of image files."""
    return next((name for name in names if any(_is_image(row.get(name)) for row in first_rows)), None)


def _is_image(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_image(value[0])
    if isinstance(value, dict):
        return {"bytes", "path"} <= value.keys()
    if isinstance(value, str):
        suffix = Path(value[-100:]).suffix.lower()
        return value.startswith("data:image/") or suffix in Image.registered_extensions()
    return isinstance(value, Image.Image)


def _is_conversation(value: Any) -> bool:
    value = parse_list(value) or value
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)
