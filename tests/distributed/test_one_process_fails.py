"""An error in any place that only one of two processes passes ends both, soon, with its message.

The places are found in the source: the branches that ask for the first process. In each one, the first process meets an
error as it gets there, in a run that continues from a checkpoint, evaluates, saves, logs, uploads and writes its pages.
"""

import ast
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hub_server import TOKEN, serve_hub
from launches import ROOT
from two_processes import run_two

IS_FIRST = re.compile(
    r"\b(should_save|is_main_process|is_world_process_zero|main|(rank|process_index) [!=]= 0)\b|'RANK'"
)
SECONDS = 30
ELSEWHERE = {  # places that this run does not pass, and why
    "tuning/console.py": "it prints",
    "tuning/exit_codes.py": "it ends a process that has failed already",
    "tuning/distributed/fsdp.py": "it only says who reads the weights",
    "tuning/training/training_state.py": "it returns from the others",
    "tuning/data/row_lengths.py": "it shows a bar",
    "tuning/data/image_joins.py": "it is about the main tensor of a picture",
}


@dataclass(frozen=True)
class Place:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.function}:{self.line}"


def find_places() -> list[Place]:
    """The first line of what only the first process runs: the branch of a condition, or what follows a return."""
    places = []
    for file in sorted((ROOT / "tuning").rglob("*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                lines = [line for block in blocks_of(function) for line in lines_of_first(block)]
                places += [Place(str(file.relative_to(ROOT)), line, function.name) for line in lines]
    return places


def blocks_of(function: ast.FunctionDef) -> list[list[ast.stmt]]:
    fields = (getattr(node, name, None) for node in ast.walk(function) for name in ("body", "orelse", "finalbody"))
    return [field for field in fields if isinstance(field, list) and field]


def lines_of_first(block: list[ast.stmt]) -> list[int]:
    lines = []
    for statement, after in zip(block, [*block[1:], None], strict=True):
        if isinstance(statement, ast.If) and IS_FIRST.search(ast.unparse(statement.test)):
            returns = isinstance(statement.body[0], ast.Return)
            begins = after if returns else statement.body[0]
            lines += [begins.lineno] if begins else []
        elif not isinstance(statement, ast.If | ast.FunctionDef | ast.ClassDef | ast.With | ast.For | ast.Try):
            choices = [node for node in ast.walk(statement) if isinstance(node, ast.IfExp)]
            lines += [statement.lineno] if any(IS_FIRST.search(ast.unparse(c.test)) for c in choices) else []
    return lines


PLACES = [place for place in find_places() if place.file not in ELSEWHERE]
OF_PREDICT = [place for place in PLACES if place.file.startswith("tuning/commands/")]
OF_TRAINING = [place for place in PLACES if place not in OF_PREDICT]


def test_there_are_places():
    assert len(PLACES) > 30
    assert {"callbacks.py", "checkpointing.py", "final_model.py"} <= {Path(place.file).name for place in PLACES}
    assert all((ROOT / file).exists() for file in ELSEWHERE)


def meet_error_at(place: Place, reached: Path) -> None:
    """The next time this process comes to the place, it meets an error."""

    def trace_lines(frame, event, _):
        if event == "line" and frame.f_lineno == place.line:
            reached.touch()
            raise ValueError(f"an error at {place}")
        return trace_lines

    def trace_calls(frame, event, _):
        code = frame.f_code
        return trace_lines if code.co_name == place.function and code.co_filename == str(ROOT / place.file) else None

    sys.settrace(trace_calls)


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as server:
        yield server


@pytest.fixture(scope="module")
def interrupted(models, mixed_rows, fsdp_settings, hub, tmp_path_factory):
    """A run of two processes as it is after its first checkpoint, and the settings of its launcher."""
    root = tmp_path_factory.mktemp("interrupted")
    lines = mixed_rows.read_text().splitlines()
    lines[12] = lines[12].replace('"assistant"', '"wizard"')
    rows = mixed_rows.parent / "one_bad.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    options = {
        "model_name_or_path": str(models["llava15"]),
        "training_data_path": str(rows),
        "validation_data_path": str(mixed_rows),
        "train_sampling_strategy": "sequential",
        "on_bad_row": "skip",
        "max_bad_fraction": 0.5,
        "output_dir": str(root / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "save_steps": 1,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "report_samples": 1,
        "dataloader_num_workers": 0,
        "report_to": ["tensorboard"],
        "push_to_hub": True,
        "hub_token": TOKEN,
        "hub_model_id": "user/tuned",
        "use_cpu": True,
    }
    (root / "options.json").write_text(json.dumps(options))
    settings = fsdp_settings | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    codes, said, _ = run_two(["train", str(root / "options.json")], root, settings, stop_after_first_checkpoint)
    assert codes == [143, 143], said
    return root, settings


def stop_after_first_checkpoint(rank: int) -> None:
    """As a signal would, in the first step."""
    from tuning.distributed.interruption import Interruption

    Interruption.check = lambda self: "a signal"


VARIANTS: dict[str, tuple[dict, dict]] = {  # further options, and settings of the launcher; the first is the usual run
    "FSDP": ({}, {}),
    "DDP": ({}, {"FSDP_VERSION": "", "ACCELERATE_USE_FSDP": "false"}),
    "sharded": ({}, {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    "best": ({"load_best_model_at_end": True, "eval_steps": 1, "resume_from_checkpoint": False}, {}),
    "auto": ({"gradient_checkpointing": "auto", "max_memory_gb": 4, "resume_from_checkpoint": False}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", OF_TRAINING, ids=str)
def test_an_error_in_training_ends_both(place, interrupted, tmp_path):
    for name, (changes, settings) in VARIANTS.items():
        folder = tmp_path / name
        if fails_at(place, *interrupted, folder, changes, settings):
            return
    pytest.fail(f"no run comes to {place}")


def fails_at(place: Place, root: Path, settings: dict, folder: Path, changes: dict, other_settings: dict) -> bool:
    """Run to the error; False where the run did not come to the place."""
    if changes.get("resume_from_checkpoint", True):
        shutil.copytree(root / "out", folder / "out")
    options = json.loads((root / "options.json").read_text()) | {"output_dir": str(folder / "out")} | changes
    folder.mkdir(exist_ok=True)
    (folder / "options.json").write_text(json.dumps(options))
    words, settings = ["train", str(folder / "options.json")], settings | other_settings
    if place.function == "upload_finished":
        assert run_two(words, folder, settings, lambda rank: None)[0] == [0, 0]
    return fail(place, words, folder, settings)


def fail(place: Place, words: list[str], folder: Path, settings: dict[str, str]) -> bool:
    reached = folder / "reached"
    codes, said, seconds = run_two(
        words, folder, settings, lambda rank: meet_error_at(place, reached) if rank == 0 else None
    )
    if not reached.exists():
        return False
    print(place, codes, seconds, said[0][-1500:], "\n-----\n", said[1][-1500:])
    assert None not in codes
    assert seconds < SECONDS
    assert f"an error at {place}" in said[0]
    assert codes in ([203, 203], [1, 1], [0, 0]) or (codes[0] and codes[1] == 0 and place.function in LAST)
    return True


LAST = ("save_final_model", "upload_finished", "predict", "answer_rows")  # the second process may have ended before


@pytest.mark.slow
@pytest.mark.parametrize("place", OF_PREDICT, ids=str)
def test_an_error_in_predict_ends_both(place, models, mixed_rows, tmp_path):
    words = ["predict", "--model_name_or_path", str(models["llava15"]), "--data_path", str(mixed_rows)]
    assert fail(place, [*words, "--output", str(tmp_path / "answers.jsonl"), "--max_rows", "4"], tmp_path, {})


def test_a_process_that_nothing_reaches_ends_when_another_one_has_failed(models, mixed_rows, tmp_path, monkeypatch):
    """As inside NCCL, which waits in a call that never returns."""
    from tuning import sft_trainer
    from tuning.distributed import watch

    monkeypatch.setattr(watch, "GRACE_SECONDS", 1.0)
    options = {"model_name_or_path": str(models["llava15"]), "training_data_path": str(mixed_rows), "use_cpu": True}
    (tmp_path / "options.json").write_text(json.dumps(options | {"output_dir": str(tmp_path / "out")}))

    def prepare(rank: int) -> None:
        def fail_or_wait(*_, **settings):
            if rank == 0:
                raise ValueError("an error of the first process")
            time.sleep(1000)

        monkeypatch.setattr(sft_trainer, "open_data", fail_or_wait)

    codes, said, seconds = run_two(["train", str(tmp_path / "options.json")], tmp_path, {}, prepare)
    assert codes == [203, 203]
    assert "an error of the first process" in said[0]
    assert seconds < SECONDS


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_an_error_while_shards_generate_together_ends_both_or_none(ranks, interrupted, tmp_path):
    """A process that fails alone ends the run; where all fail, the model cannot answer, and trains without samples."""
    root, settings = interrupted
    options = json.loads((root / "options.json").read_text())
    for name in ("push_to_hub", "hub_token", "hub_model_id", "report_to", "validation_data_path", "eval_strategy"):
        del options[name]
    options |= {"output_dir": str(tmp_path / "out"), "report_samples": 2, "max_steps": 1}
    (tmp_path / "options.json").write_text(json.dumps(options))

    def prepare(rank: int) -> None:
        from transformers import GenerationMixin

        def fail(*_, **inputs):
            raise ValueError("an error while it answers")

        if rank in ranks:  # after the first token
            GenerationMixin._update_model_kwargs_for_generation = fail

    codes, said, seconds = run_two(["train", str(tmp_path / "options.json")], tmp_path, settings, prepare)
    assert seconds < SECONDS
    if len(ranks) == 2:
        assert codes == [0, 0], said
        assert "The report shows no samples. This model cannot answer by generation here" in said[0]
    else:
        assert codes == [203, 203], said
        assert "Internal error: ValueError: an error while it answers" in said[ranks[0]]


def test_a_data_worker_that_is_killed_during_evaluation_ends_both(interrupted, tmp_path):
    root, settings = interrupted
    options = json.loads((root / "options.json").read_text())
    for name in ("push_to_hub", "hub_token", "hub_model_id", "report_to"):
        del options[name]
    options |= {"output_dir": str(tmp_path / "out"), "eval_steps": 1, "dataloader_num_workers": 1}
    options |= {"per_device_eval_batch_size": 1}
    (tmp_path / "options.json").write_text(json.dumps(options))

    def prepare(rank: int) -> None:
        from tuning.training.trainer import SupervisedTrainer

        take, seen = SupervisedTrainer._take_info, []

        def take_and_kill(trainer, batch, evaluating=False):
            seen.append(evaluating)
            if rank == 1 and sum(seen) == 2:
                for worker in psutil.Process().children():
                    worker.kill()
                    worker.wait()
            return take(trainer, batch, evaluating)

        SupervisedTrainer._take_info = take_and_kill

    codes, said, seconds = run_two(["train", str(tmp_path / "options.json")], tmp_path, settings, prepare)
    assert seconds < SECONDS
    assert codes[1] == 1, said
    assert codes[0] in (1, 203), said
    assert re.search(r"dataloader_num_workers: a process that reads data \(pid \d+\) .*killed", said[1])
