"""Whatever options and rows a command gets, it ends with exit code 0 or 1 and a message, never with a traceback."""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tuning import cli
from tuning.config.legacy_names import REEXPRESSED, REMOVED, RENAMED
from tuning.config.parse import KNOWN, TYPES
from tuning.console import close_progress_bars

NUMBERS = (-1, 0, 1, 2, 0.5, -0.5, 1e-300, 1e300, 2**31, 2**63, 10**400, math.nan, math.inf, -math.inf)
TEXTS = (
    *(
        "",
        " ",
        "none",
        "null",
        "auto",
        "true",
        "no",
        "all",
        "steps",
        "epoch",
        "1",
        "-1",
        "nan",
        "é",
        "🙂" * 300,
        "\ud83d",
    ),
    *(
        "a\0b",
        "~nobody/x",
        "/dev/null",
        "/dev/null/x",
        "no/such/file.json",
        "[",
        "{",
        "[1]",
        '{"a": 1}',
        "{{ x",
        "{% if %}",
    ),
    *("lora", "adamw_torch", "adamw_8bit", "galore_adamw", "cosine", "polynomial", "all-linear", "(", "q_proj,"),
)
SIMPLE = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS))
VALUES = st.one_of(
    SIMPLE,
    st.lists(SIMPLE, max_size=2),
    st.dictionaries(st.sampled_from(["", "path", "weight", "num_processes", "min_lr", "foo"]), SIMPLE, max_size=2),
)
# What the machine, the network or an endless run would decide, not the options.
NOT_TRIED = {"resume_from_checkpoint", "push_to_hub", "trackio_space_id", "report_to", "output_dir"}
ENDLESS = {name for name in KNOWN if any(kind in (int, float) for kind in (TYPES[name], *typing.get_args(TYPES[name])))}
TRAINED = sorted(KNOWN - NOT_TRIED - ENDLESS - {"torch_compile", "accelerate_launch_args", "deepspeed", "fsdp"})
NAMES = sorted((KNOWN - NOT_TRIED) | {*RENAMED, *REMOVED, *REEXPRESSED, "lora_rank", "", "x" * 300})

IMAGE = {"type": "image"}
CONTENTS = st.recursive(
    st.one_of(
        SIMPLE,
        st.sampled_from(
            ["Which colour?", "<image>", "<image>\nWhy?", "<|end_of_text|>", "\ue000probe0\ue001", "{{ x }}"]
        ),
        st.just([IMAGE]),
        st.sampled_from([{"type": "text", "text": "Red."}, {"type": "image_url", "image_url": {"url": "a.png"}}]),
        st.fixed_dictionaries({"type": SIMPLE, "text": SIMPLE}),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "image"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "USER", "", None, 3])
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}),
    st.fixed_dictionaries({"from": ROLES, "value": CONTENTS}),
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls"]), CONTENTS, max_size=3
    ),
    SIMPLE,
)
PICTURES = st.one_of(
    st.sampled_from(["a.png", "thin.png", "cut.png", "../a.png", "text.png", "data:image/png;base64,iVBOR", "A" * 80]),
    st.fixed_dictionaries({"bytes": SIMPLE, "path": st.sampled_from(["a.png", None, 3])}),
    SIMPLE,
)
KEYS = st.sampled_from(
    ["messages", "images", "conversations", "image", "prompt", "completion", "system", "tools", "é", ""]
)
GOOD = {
    "messages": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Red."},
    ],
    "images": ["a.png"],
}
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=4), "images": st.lists(PICTURES, max_size=2)}),
    st.fixed_dictionaries({"messages": st.just(GOOD["messages"]), "images": st.lists(PICTURES, max_size=2) | PICTURES}),
    st.dictionaries(KEYS, st.one_of(CONTENTS, st.lists(MESSAGES, max_size=2)), max_size=3),
    st.just(GOOD),
    SIMPLE,
)
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
number = itertools.count()


def many(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)


@pytest.fixture(scope="module")
def base(models, tmp_path_factory):
    """A folder with pictures and rows, which is the working folder, and the options of a short run there."""
    folder = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    Image.new("RGB", (1, 3000), "red").save(folder / "thin.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    (folder / "rows.jsonl").write_text((json.dumps(GOOD) + "\n") * 4)
    before = Path.cwd()
    os.chdir(folder)
    yield {
        "model_name_or_path": str(models["granite_vision"]),
        "training_data_path": "rows.jsonl",
        "max_steps": 1,
        "report_samples": 0,
        "sample_rows": 1,
        "dataloader_num_workers": 0,
        "verify_save": False,
    }
    os.chdir(before)


def run(*argv: str) -> str:
    """What a command prints. It must end with 0 or 1, and with a message."""
    environment = dict(os.environ)
    printed, errors = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", strictness) for strictness in ("strict", "backslashreplace")
    )
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = cli.main(argv)
            close_progress_bars()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    printed.seek(0)
    errors.seek(0)
    text = printed.read() + errors.read()
    assert code in (0, 1), text
    assert "Traceback" not in text
    assert code == 0 or "Error: " in text
    return text


def run_config(command: str, options: dict) -> str:
    """A command with a config file, and an output folder of its own."""
    Path("config.json").write_text(json.dumps({"output_dir": f"out-{next(number)}", **options}))
    return run(command, "config.json")


def check_options(base: dict, changes: dict) -> None:
    run_config("check", base | changes)


def train_options(base: dict, changes: dict) -> None:
    run_config("train", base | changes)


def give_flags(base: dict, words: list[str]) -> None:
    for command in ("check", "predict", "export", "convert"):
        run(command, *words)


def read_row(base: dict, rows: list) -> None:
    Path("fuzzed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_config("check", {**base, "training_data_path": "fuzzed.jsonl"})
    run("convert", "fuzzed.jsonl", f"made-{next(number)}.jsonl")


CHANGES = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3)
TRAIN_CHANGES = st.dictionaries(st.sampled_from(TRAINED), VALUES, min_size=1, max_size=2)
FLAGS = st.sampled_from(
    [f"--{name}" for name in NAMES if len(name) < 99] + ["--adapter", "--output", "--data_path", "--", "-x"]
)
WORDS = st.lists(st.one_of(FLAGS, st.sampled_from([text for text in TEXTS if text != "/dev/null"])), max_size=4)
LINES = st.lists(ROWS, min_size=1, max_size=3)


@many(120)
@given(CHANGES)
def test_no_options_end_check_with_a_traceback(base, changes):
    check_options(base, copy.deepcopy(changes))


@many(15)
@given(TRAIN_CHANGES)
def test_no_options_end_training_with_a_traceback(base, changes):
    train_options(base, copy.deepcopy(changes))


@many(150)
@given(WORDS)
def test_no_command_line_ends_with_a_traceback(base, words):
    give_flags(base, words)


@many(60)
@given(LINES)
def test_no_rows_end_with_a_traceback(base, rows):
    read_row(base, rows)


@pytest.mark.slow
@many(1500)
@given(CHANGES)
def test_thousands_of_options_end_check_without_a_traceback(base, changes):
    check_options(base, copy.deepcopy(changes))


@pytest.mark.slow
@many(300)
@given(TRAIN_CHANGES)
def test_hundreds_of_options_end_training_without_a_traceback(base, changes):
    train_options(base, copy.deepcopy(changes))


@pytest.mark.slow
@many(1000)
@given(LINES)
def test_thousands_of_rows_end_without_a_traceback(base, rows):
    read_row(base, rows)
