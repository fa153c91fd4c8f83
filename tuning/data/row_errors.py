"""Errors of rows that cannot be trained."""

from tuning.data.sources import Row
from tuning.errors import UserError, describe_failure

TOO_LONG = "too long"  # the kind of an error


def too_long(row: Row, length: int, limit: int, fix: str = "") -> UserError:
    """A row of `length` tokens, more than `limit`."""
    return _text_error(
        row,
        problem=f"{length} tokens are more than max_seq_length {limit}.",
        fix=fix or "Raise max_seq_length, shorten the row, or set overlong_rows drop or truncate_text.",
        kind=TOO_LONG,
    )


def too_many_messages(row: Row, messages: int, limit: int) -> UserError:
    """A row of more than `limit` messages."""
    return _text_error(
        row,
        problem=f"{messages} messages are more than max_messages_per_row {limit}.",
        fix="Split the row, or raise max_messages_per_row.",
        kind="too many messages",
    )


def nothing_trained(row: Row) -> UserError:
    """A row without a supervised token."""
    return _text_error(
        row,
        problem="no token of this row would be trained.",
        fix="Check the answer and the chat template.",
        kind="nothing to train",
    )


def unknown_token(row: Row, token: str, number: int, embeddings: int) -> UserError:
    """A row with a token for which the model has no embedding."""
    return _text_error(
        row,
        problem=(
            f"the token {token!r} has the id {number}, but the model has {embeddings} embeddings: the tokenizer was"
            " extended, the model was not."
        ),
        fix="Call the model's resize_token_embeddings(len(tokenizer)) and save it, or use its own tokenizer.",
        kind="token without an embedding",
    )


def not_left_out(row: Row, spans: int, answers: int) -> UserError:
    """A row of which some answers are context, with a chat template that marks other spans than its answers."""
    return _text_error(
        row,
        problem=f"the chat template marks {spans} spans in {answers} answers as trained.",
        fix="Set a chat_template that marks each answer once, to leave answers out.",
        kind="answers that cannot be left out",
    )


def not_only_answer(row: Row, processor: str, *, answers: int) -> UserError:
    """A row of several trained `answers`, or of which everything is trained (0), for a processor of prompts."""
    what = f"this row has {answers} answers to train" if answers else "the prompt would be trained, too"
    fix = (
        "Set train_on last_turn, or give each answer a row of its own." if answers else "Set assistant_only_loss true."
    )
    return _text_error(
        row,
        problem=f"{processor} takes one prompt and one answer, and {what}.",
        fix=fix,
        kind="several answers for a processor of prompts",
    )


def refused(row: Row, error: Exception, *, has_images: bool) -> UserError:
    """A row for which the processor raised `error`, or whose tokens cannot be located (`UserError`)."""
    field = row.format.field_of_images if has_images else row.format.text_fields[-1]
    if isinstance(error, UserError):
        return UserError(where=row.where, problem=error.problem, fix=error.fix, field=field, kind=error.kind)
    return UserError(
        where=row.where,
        problem=f"the model's processor refuses this row: {describe_failure(error)}.",
        fix="Change its images or its text, or drop it.",
        field=field,
        kind="refused by the processor",
    )


def wrong_number_of_images(row: Row, placeholders: int, images: int) -> UserError:
    """A row that has not one image for each placeholder."""
    fields = [f"'{name}'" for name in (row.format.text_fields[0], row.format.image_field) if name]
    return UserError(
        where=f"{row.where}, field{'s'[: len(fields) - 1]} {' and '.join(fields)}",
        problem=f"the messages have {placeholders} image placeholders, but there are {images} images.",
        fix='Give one {"type": "image"} part for each image.',
        field=row.format.field_of_images,
        kind="wrong number of images",
    )


def _text_error(row: Row, *, problem: str, fix: str, kind: str) -> UserError:
    field = row.format.text_fields[-1]
    return UserError(where=f"{row.where}, field '{field}'", problem=problem, fix=fix, field=field, kind=kind)
