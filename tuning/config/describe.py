"""Options in words: for `--help`, and for the page of the documentation that lists them all."""

import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from tuning.config.options import SECTIONS, TRAINING_FIELDS, RunConfig
from tuning.config.values import describe_choices, describe_type


@dataclass(frozen=True)
class OptionDescription:
    """One option as a user reads about it. `type`: in words, or its choices; `default`: empty if there is none."""

    section: str
    name: str
    flag: str
    type: str
    default: str
    help: str
    choices: tuple[Any, ...]


def describe_all_options() -> list[OptionDescription]:
    """All options of a run but those of `TrainingArguments`, by section."""
    return [option for section, kind in SECTIONS.items() for option in describe_fields(kind, section)]


def describe_fields(kind: Any, section: str = "") -> Iterator[OptionDescription]:
    """The options of one dataclass."""
    types_of = typing.get_type_hints(kind)
    for entry in fields(kind):
        choices, default = entry.metadata["choices"], entry.default
        yield OptionDescription(
            section,
            entry.name,
            flag=entry.metadata["positional"] or f"--{entry.name}",
            type=describe_choices(choices) if choices else describe_type(types_of[entry.name]),
            default="" if default in (None, "", MISSING) else describe_choices((default,)),
            help=entry.metadata["help"],
            choices=choices,
        )


def describe_command(usage: str, kind: Any) -> str:
    """The `--help` of a command whose options are those of a run (`RunConfig`), or the fields of `kind`."""
    lines = [f"usage: {usage}", ""]
    if kind is not RunConfig:
        return "\n".join([*lines, *map(_help_line, describe_fields(kind))])
    for section, own in SECTIONS.items():
        lines += [f"{section}:", *map(_help_line, describe_fields(own))]
    return "\n".join(
        [*lines, "", "training (transformers.TrainingArguments):", "  " + " ".join(sorted(TRAINING_FIELDS))]
    )


def _help_line(option: OptionDescription) -> str:
    choices = f" ({option.type})" if option.choices else ""
    default = f" [{option.default}]" if option.default else ""
    return f"  {option.flag:<32} {option.help}{choices}{default}"
