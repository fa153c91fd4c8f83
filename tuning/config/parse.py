"""Command line, JSON file or environment → one checked `RunConfig`, with every problem reported at once."""

import base64
import binascii
import copy
import difflib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import TrainingArguments

from tuning.config import legacy_names
from tuning.config.options import (
    AUTO,
    OWN_OPTIONS,
    SECTIONS,
    TRAINING_DEFAULTS,
    TRAINING_FIELDS,
    TRAINING_LIMITS,
    RunConfig,
)
from tuning.config.rules import BY_MEMORY, complete, find_path_problems, find_problems, groups_by_length
from tuning.config.values import coerce, find_value_problems, to_json_value
from tuning.errors import UserError, describe_failure, first_line, try_optional
from tuning.files import read_user_text

TYPES = typing.get_type_hints(TrainingArguments) | {"resume_from_checkpoint": bool | str | None}
for _kind in SECTIONS.values():
    TYPES |= typing.get_type_hints(_kind)
TYPES |= {name: dict[str, Any] | None for name in TRAINING_FIELDS if name.endswith("_kwargs")}  # no text but JSON's
TYPES |= {name: TYPES[name] | typing.Literal[AUTO] for name in BY_MEMORY}
KNOWN = set(OWN_OPTIONS) | set(TRAINING_FIELDS)
LIMITS = {name: entry.metadata for name, entry in OWN_OPTIONS.items()} | TRAINING_LIMITS


def read_options(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Collect the options of a run from its command line, or from the environment if that is empty.

    The command line has flags (`--name value …`, `--name=value`, `--flag`, `--no_flag`) or begins with a JSON file,
    whose options the flags override. `SFT_TRAINER_CONFIG_JSON_PATH` is the path of such a file,
    `SFT_TRAINER_CONFIG_JSON_ENV_VAR` its text in base64. Raises `UserError` for words that are neither.
    """
    if argv:
        return _read_words(argv, KNOWN)
    if path := environ.get("SFT_TRAINER_CONFIG_JSON_PATH"):
        return read_json(path)
    if encoded := environ.get("SFT_TRAINER_CONFIG_JSON_ENV_VAR"):
        return _decode_json(encoded)
    raise UserError(problem="no options were given.", fix="Give flags or a JSON config file; --help lists them.")


def _read_words(argv: Sequence[str], known: Set[str], positional: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a command line. `positional`: options that need no flag; the others then take at most one word."""
    arguments, open_places = list(argv), list(positional)
    options: dict[str, Any] = {}
    if arguments and not positional and not arguments[0].startswith("--"):
        options = read_json(arguments.pop(0))
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, has_value, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = value if has_value else _Values()
        elif name is not None and isinstance(options[name], _Values) and not (positional and options[name]):
            options[name].append(argument)
        elif open_places:
            options[open_places.pop(0)] = argument
        else:
            raise UserError(problem=f"'{argument}' is neither a flag nor the value of one.", fix="Flags begin with --.")
    return dict(_finish_flag(name, value, known) for name, value in options.items())


class _Values(list):
    """The words that follow a flag."""


def _finish_flag(name: str, value: Any, known: Set[str]) -> tuple[str, Any]:
    if not isinstance(value, _Values):
        return name, value
    if not value:
        negated = name.removeprefix("no_")
        return (negated, False) if name not in known and negated in known else (name, True)
    return name, value[0] if len(value) == 1 else list(value)


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a config file. Raises `UserError` if it cannot be read, is not JSON, or is not an object."""
    where = os.fsdecode(path)
    text = read_user_text(where, where=where, what="the config file", fix="Give the path of a JSON file, or flags.")
    return _load_object(text, where)


def _decode_json(encoded: str) -> dict[str, Any]:
    where = "SFT_TRAINER_CONFIG_JSON_ENV_VAR"
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise UserError(
            where=where, problem="the value is not base64 of JSON text.", fix="Encode it with: base64 -w0 config.json"
        ) from error
    return _load_object(text, where)


def _load_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}, column {error.colno}"
        raise UserError(
            where=place, problem=f"this is not valid JSON: {error.msg}.", fix="Correct the text."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        what = f"this JSON cannot be read: {first_line(error)}."
        raise UserError(where=where, problem=what, fix="Correct the text.") from error
    if not isinstance(value, dict):
        what = f"the config must be a JSON object with option names, not a {type(value).__name__}."
        raise UserError(where=where, problem=what, fix='Write the options as {"name": value, …}.')
    return value


@dataclass(frozen=True)
class CheckedOptions:
    """The options of a run by the names of today, typed, checked and completed, and notes to print about them."""

    values: dict[str, Any]
    notes: tuple[str, ...]


def build_config(options: Mapping[str, Any]) -> RunConfig:
    """Turn options under any name, old or new, into a `RunConfig`; see `check_options`."""
    return make_config(check_options(options))


def check_options(options: Mapping[str, Any]) -> CheckedOptions:
    """The first half of `build_config`: it loads nothing and touches no device, so that a launcher may call it.

    Raises one `UserError` that lists every problem: unknown names (with the nearest real one), values of the wrong
    type or outside the limits, and rules between options. `options` stay as they are, nested objects included.
    """
    problems: list[str] = []
    current = _translate_names(to_json_value(options), problems)
    values, notes = complete(_coerce_all(current, TYPES, problems))
    problems += find_value_problems(values, LIMITS)
    _raise_all([*problems, *_not_of_options(find_problems(values), problems)])
    return CheckedOptions(values, notes)


def _not_of_options(found: Iterable[str], problems: Iterable[str]) -> list[str]:
    """The problems `found` that name no option which has one of `problems` already: they follow from that."""
    names = {name for problem in problems for name in problem.partition(":")[0].split(", ")}
    return [problem for problem in found if names.isdisjoint(re.findall(r"\w+", problem))]


def make_config(options: CheckedOptions) -> RunConfig:
    """The second half of `build_config`: `TrainingArguments` may start this process's device. Raises `UserError`."""
    values = options.values
    sections = {section: _make(kind, values) for section, kind in SECTIONS.items()}
    auto = frozenset(name for name in BY_MEMORY if values.get(name) == AUTO)
    arguments = TRAINING_DEFAULTS | {name: values[name] for name in TRAINING_FIELDS if name in values}
    arguments |= {name: least for name, least in BY_MEMORY.items() if name in auto}
    training = try_optional(lambda: TrainingArguments(**arguments))  # opens files and packages that the user chose
    if training.error:
        is_plain = isinstance(training.error, (ValueError, NotImplementedError))
        problem = str(training.error) if is_plain else f"{describe_failure(training.error)}."
        raise UserError(where="config", problem=problem) from training.error
    assert training.value is not None
    return RunConfig(
        **sections,
        training=training.value,
        notes=options.notes,
        group_by_length=groups_by_length(values),
        auto=auto,
    )


def resolve(config: RunConfig | Mapping[str, Any] | str | os.PathLike) -> RunConfig:
    """The config of a run, from options by name, the path of a JSON file, or a `RunConfig`, which stays as it is.

    Without a launcher a run uses one device. With several GPUs transformers would choose `nn.DataParallel`, which is
    slow and computes another loss.
    """
    if not isinstance(config, RunConfig):
        config = build_config(config if isinstance(config, Mapping) else read_json(config))
    gpus = config.training.n_gpu
    if gpus <= 1:
        return config
    training = copy.copy(config.training)
    training._n_gpu = 1
    note = (
        f"Using one of {gpus} GPUs. To use all: vlm-tuning train …, or accelerate launch --num_processes={gpus}"
        " --config_file fixtures/accelerate_fsdp_defaults.yaml tuning/sft_trainer.py …"
    )
    return replace(config, training=training, notes=(*config.notes, note))


def _make(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.name in values})


def read_command(argv: Sequence[str], kind: Any) -> Any:
    """The options of a command as an instance of `kind`: `RunConfig`, or the dataclass of a command's own options.

    Those come from flags or a JSON file, with the same checks of names, types, limits and paths as those of a run.
    Raises one `UserError` that lists every problem.
    """
    if kind is RunConfig:
        return build_config(read_options(argv))
    entries = {entry.name: entry for entry in fields(kind)}
    positional = {name: entry.metadata["positional"] for name, entry in entries.items() if entry.metadata["positional"]}
    types_of, problems, current = typing.get_type_hints(kind), list[str](), {}
    for name, value in _read_words(argv, set(entries), list(positional)).items():
        new_name = legacy_names.RENAMED.get(name, name)
        if new_name in entries:
            current[new_name] = value
        else:
            problems.append(f"{name}: unknown option.{_nearest(name, set(entries))}")
    values = _coerce_all(current, types_of, problems)
    problems += find_value_problems(values, {name: entry.metadata for name, entry in entries.items()})
    required = [name for name, entry in entries.items() if entry.metadata["required"]]
    missing = [f"{positional.get(name, name)}: is required" for name in required if not values.get(name)]
    _raise_all([*problems, *_not_of_options([*missing, *find_path_problems(values)], problems)])
    return _make(kind, values)


def to_flags(options: Any) -> list[str]:
    """The command line from which `read_command` makes the same `options` again."""
    values = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
        if value is not None
    ]


def _coerce_all(options: Mapping[str, Any], types_of: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    values = {}
    for name, value in options.items():
        try:
            converted = coerce(value, types_of[name])
            if converted is not None or type(None) in typing.get_args(types_of[name]):
                values[name] = converted  # null leaves the default of an option that cannot be null
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return values


def _raise_all(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        listed = "\n  - ".join([f"{len(found)} problems:", *found])
        raise UserError(where="config", problem=found[0] if len(found) == 1 else listed)


def _translate_names(options: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    current: dict[str, Any] = {}
    for name, value in options.items():
        if name in legacy_names.REEXPRESSED and name not in KNOWN:
            try:
                translated = legacy_names.REEXPRESSED[name](value)
            except (TypeError, ValueError):
                problems.append(f"{name}: {value!r} is not a valid value")
                continue
        elif name in legacy_names.RENAMED:
            translated = {legacy_names.RENAMED[name]: value}
        elif name in KNOWN:
            translated = {name: value}
        elif name in legacy_names.REMOVED:
            problems.append(f"{name}: is no longer an option. {legacy_names.REMOVED[name]}")
            continue
        else:
            candidates = KNOWN | set(legacy_names.RENAMED) | set(legacy_names.REEXPRESSED)
            problems.append(f"{name}: unknown option.{_nearest(name, candidates)}")
            continue
        for new_name, new_value in translated.items():
            if new_name in current and current[new_name] != new_value:
                problems.append(f"{name}: means {new_name}, which is also given with another value")
            current[new_name] = new_value
    return current


def _nearest(name: str, candidates: set[str]) -> str:
    elsewhere = legacy_names.ELSEWHERE.get(name)
    if elsewhere in candidates:
        return f" Did you mean {elsewhere}?"
    close = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else " --help lists the options."
