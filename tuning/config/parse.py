"""Command line, JSON file or environment → one checked `RunConfig`, with every problem reported at once."""

import base64
import binascii
import copy
import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tuning.config import legacy_names
from tuning.config.options import SECTIONS, TRAINING_DEFAULTS, RunConfig
from tuning.config.rules import adjust, find_problems, find_row_problems, groups_by_length
from tuning.errors import UserError

OWN_FIELDS = {entry.name: section for section, kind in SECTIONS.items() for entry in dataclasses.fields(kind)}
TYPES = typing.get_type_hints(TrainingArguments) | {"resume_from_checkpoint": bool | str | None}
for _kind in SECTIONS.values():
    TYPES |= typing.get_type_hints(_kind)
KNOWN = set(OWN_FIELDS) | set(legacy_names.TRAINING_FIELDS)


def read_options(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ, known: Set[str] = KNOWN
) -> dict[str, Any]:
    """Collect the options of a command line: `--name value …`, `--name=value`, `--flag`, `--no_flag`, or a JSON file.

    Flags beside a JSON file override it. Without arguments the config comes from `SFT_TRAINER_CONFIG_JSON_PATH` (a
    path) or `SFT_TRAINER_CONFIG_JSON_ENV_VAR` (base64 of JSON text). Raises `UserError` for what is not an option.
    """
    arguments = list(argv)
    options: dict[str, Any] = {}
    if not arguments:
        if path := environ.get("SFT_TRAINER_CONFIG_JSON_PATH"):
            return read_json(path)
        if encoded := environ.get("SFT_TRAINER_CONFIG_JSON_ENV_VAR"):
            return _decode_json(encoded)
        raise UserError(problem="no options were given.", fix="Give flags or a JSON config file; --help lists them.")
    if not arguments[0].startswith("--"):
        options = read_json(arguments.pop(0))
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, has_value, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = value if has_value else _Values()
        elif name is not None and isinstance(options[name], _Values):
            options[name].append(argument)
        else:
            raise UserError(problem=f"'{argument}' is neither a flag nor the value of one.", fix="Flags begin with --.")
    return dict(_finish_flag(name, value, known) for name, value in options.items())


class _Values(list):
    """The words that followed a flag."""


def _finish_flag(name: str, value: Any, known: Set[str]) -> tuple[str, Any]:
    if not isinstance(value, _Values):
        return name, value
    if not value:
        negated = name.removeprefix("no_")
        return (negated, False) if name not in known and negated in known else (name, True)
    return name, value[0] if len(value) == 1 else list(value)


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a config file. Raises `UserError` if it is not there, not JSON, or not an object."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(where=str(path), problem=f"cannot read the config file: {error.strerror}.") from error
    return _load_object(text, where=str(path))


def _decode_json(encoded: str) -> dict[str, Any]:
    where = "SFT_TRAINER_CONFIG_JSON_ENV_VAR"
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise UserError(
            where=where, problem="is not base64 of JSON text.", fix="Encode it with: base64 -w0 config.json"
        ) from error
    return _load_object(text, where)


def _load_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            where=f"{where}, line {error.lineno}, column {error.colno}", problem=f"not valid JSON: {error.msg}."
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            where=where, problem=f"expected a JSON object with option names, found a {type(value).__name__}."
        )
    return value


def build_config(options: Mapping[str, Any]) -> RunConfig:
    """Turn options under any name, old or new, into a `RunConfig`.

    Raises one `UserError` that lists every problem: unknown names (with the nearest real one), values of the wrong
    type, and rules between options. Nothing is loaded.
    """
    values, notes = check_options(options)
    sections = {
        section: kind(**{key: value for key, value in values.items() if OWN_FIELDS.get(key) == section})
        for section, kind in SECTIONS.items()
    }
    training = {key: value for key, value in values.items() if key in legacy_names.TRAINING_FIELDS}
    try:
        training_arguments = TrainingArguments(**(TRAINING_DEFAULTS | training))
        return RunConfig(**sections, training=training_arguments, notes=notes, group_by_length=groups_by_length(values))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(where="config", problem=str(error)) from error


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
    return dataclasses.replace(config, training=training, notes=(*config.notes, note))


def check_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The first half of `build_config`, which touches no device: today's names and typed values, and what to tell."""
    problems: list[str] = []
    current = _translate_names(options, problems)
    values, notes = adjust(_coerce_all(current, TYPES, problems))
    problems += find_problems(values)
    _raise_all(problems)
    return values, notes


def read_command(argv: Sequence[str], *kinds: type, required: Sequence[str] = ()) -> list[Any]:
    """The options of a command that does not train, as an instance of each of `kinds`, dataclasses of options.

    They come as for training, from flags or a JSON file, with the same checks of names, types, choices and paths.
    Raises one `UserError` that lists every problem.
    """
    types_of: dict[str, Any] = {}
    for kind in kinds:
        types_of |= typing.get_type_hints(kind)
    problems: list[str] = []
    current = {}
    for name, value in read_options(argv, environ={}, known=set(types_of)).items():
        new_name = legacy_names.RENAMED.get(name, name)
        if new_name in types_of:
            current[new_name] = value
        else:
            problems.append(f"{name}: unknown option.{_nearest(name, set(types_of))}")
    values = _coerce_all(current, types_of, problems)
    problems += [f"{name}: is required" for name in required if not values.get(name)]
    problems += find_row_problems(values)
    _raise_all(problems)
    return [
        kind(**{entry.name: values[entry.name] for entry in dataclasses.fields(kind) if entry.name in values})
        for kind in kinds
    ]


def _coerce_all(options: Mapping[str, Any], types_of: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    values = {}
    for name, value in options.items():
        try:
            converted = coerce(value, types_of[name])
            if converted is not None or type(None) in typing.get_args(types_of[name]):
                values[name] = converted  # null, where the option cannot be null, leaves the default
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return values


def _raise_all(problems: list[str]) -> None:
    if problems:
        listed = "\n  - ".join([f"{len(problems)} problems:", *problems])
        raise UserError(where="config", problem=problems[0] if len(problems) == 1 else listed)


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
    close = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else " --help lists the options."


TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def coerce(value: Any, kind: Any) -> Any:
    """Turn a flag's text or a JSON value into the annotated type `kind`. `ValueError` says what was expected."""
    allowed = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if value is None or (isinstance(value, str) and (value == "null" or (value == "none" and str not in allowed))):
        if type(None) in allowed or str not in allowed:
            return None
        raise ValueError("a value is needed")
    for candidate in sorted(allowed, key=_trying_order):
        converted = _convert(value, candidate)
        if converted is not None:
            return converted
    expected = " or ".join(_describe(candidate) for candidate in allowed if candidate is not type(None))
    raise ValueError(f"expected {expected}, got {value!r}")


def _trying_order(kind: Any) -> int:
    """Narrow types first: text fits everything."""
    return {bool: 0, int: 1, float: 2, str: 4}.get(kind, 3)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or None where it is not one."""
    origin = typing.get_origin(kind) or kind
    if origin is bool:
        if isinstance(value, str):
            return True if value.lower() in TRUE else False if value.lower() in FALSE else None
        return value if isinstance(value, bool) else None
    if origin in (int, float):
        return _convert_number(value, origin)
    if origin in (dict, list):
        return _convert_json(value, origin)
    if origin is str:
        return value if isinstance(value, str) else None
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value if value in [member.value for member in origin] else None
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) else None
    return value if isinstance(origin, type) and isinstance(value, origin) else None


def _convert_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if kind is float:
        return number
    return int(number) if number.is_integer() else None


def _convert_json(value: Any, kind: type) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from error
    return value if isinstance(value, kind) else None


def _describe(kind: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a JSON object"}
    return words.get(typing.get_origin(kind) or kind, "a list" if typing.get_origin(kind) is list else str(kind))


def describe_options(usage: str) -> str:
    """The text of `--help` under `usage`: every option of ours with its default, and Hugging Face's by name."""
    lines = [f"usage: {usage}", ""]
    for section, kind in SECTIONS.items():
        lines += [f"{section}:", *_describe_fields(kind)]
    lines += ["", "training (transformers.TrainingArguments):", "  " + " ".join(sorted(legacy_names.TRAINING_FIELDS))]
    return "\n".join(lines)


def describe_command(usage: str, *kinds: type) -> str:
    """The `--help` of a command whose options are the fields of `kinds`."""
    return "\n".join([f"usage: {usage}", "", *(line for kind in kinds for line in _describe_fields(kind))])


def _describe_fields(kind: type) -> list[str]:
    lines = []
    for entry in dataclasses.fields(kind):
        default = "" if entry.default in (None, "", dataclasses.MISSING) else f" [{entry.default}]"
        lines.append(f"  --{entry.name:<30} {entry.metadata['help']}{default}")
    return lines
