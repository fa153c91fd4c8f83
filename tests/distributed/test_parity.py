"""Two processes, with DDP or FSDP2, train the very model that one process trains."""

import json
from pathlib import Path

import pytest
import torch
from architectures.case import Case
from launches import EXAMINED, LORA, outcomes, run_jobs
from preparation import HAS_BITSANDBYTES
from safetensors.torch import load_file
from tiny_models import LAYOUTS

import tuning

METHODS = {"full": {}, "lora": LORA}
EXAMINED_CASES = ("granite_vision full", "llava15 lora", "mllama full")
# A large epsilon: else Adam takes a full step wherever a gradient is mere rounding.
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-3, "weight_decay": 0.1}
# In sequential order the first process has text only where the second has images, and the other way round.
ARRANGED = {"train_sampling_strategy": "sequential"}
CASES = {f"{layout} {method}": (layout, changes) for layout in LAYOUTS for method, changes in METHODS.items()}
CASES |= {f"{layout} arranged": (layout, ARRANGED) for layout in ("granite_vision", "mllama")}
CASES |= {
    "mllama arranged lora": ("mllama", ARRANGED | LORA),
    "grouped by length": ("llava_next_vicuna", {"train_sampling_strategy": "group_by_length"}),
    "grouped by length, padded": ("granite_vision", {"padding_free": False}),
    "token budget": ("llava_next_vicuna", {"max_tokens_per_batch": 200}),
    "token budget, padded": ("llava15", {"max_tokens_per_batch": 200, "padding_free": False}),
    "token budget, max_steps": ("llava15", {"max_tokens_per_batch": 200, "max_steps": 7}),
    "streamed": ("llava16_mistral", {"streaming": True, "max_steps": 6}),
    "streamed by workers": ("llava15", {"streaming": True, "max_steps": 6, "dataloader_num_workers": 2}),
    "checkpointed": ("granite_vision", {"gradient_checkpointing": True}),
    "recomputed as memory asks": ("llava15", {"gradient_checkpointing": "auto", "max_memory_gb": 0.003}),
    "named layers": ("granite_vision", {"environ": {"FSDP_TRANSFORMER_CLS_TO_WRAP": "GraniteDecoderLayer"}}),
    "bf16": ("llava15", {"bf16": True}),  # a loss that is itself in bfloat16 would be off by up to 4e-3
    "parts at their own pace": ("llava15", {"vision_tower_learning_rate": 0.5, "projector_learning_rate": 0.01}),
    # Weight decay moves the vision tower although no row has an image: as if one had it, with a gradient of zero.
    "text only": ("llava15", {"training_data_path": "text_only.jsonl", **ADAMW}),
}
# One of each way to take packed rows: positions in several dimensions, layers row by row, masks, images apart by row.
PACKED = ("qwen2_5_vl", "qwen3_5", "gemma3", "smolvlm")
CASES |= {name: (name, {}) for name in PACKED}
for case in EXAMINED_CASES:
    CASES[case] = (CASES[case][0], CASES[case][1] | EXAMINED)
if HAS_BITSANDBYTES:
    CASES["4bit"] = ("llava15", LORA | {"quantization": "4bit"})
SPLITS = {"2x4": (4, 1), "2x2x2": (2, 2)}
# What only `make test-slow` runs: layouts that are like another one, other ways to batch, options with more tests.
RARE = {
    *PACKED,
    *("granite_vision lora", "llava15 full", "llava_next_vicuna full", "llava_next_vicuna lora"),
    *("llava16_mistral full", "llava16_mistral lora", "granite_vision arranged", "mllama arranged lora"),
    *("grouped by length, padded", "token budget, padded", "token budget, max_steps", "streamed by workers"),
    *("named layers", "recomputed as memory asks", "parts at their own pace"),
}
ACCUMULATED = ("granite_vision full", "token budget")  # the cases that `make test` also accumulates
# SGD: Adam's first steps have the size of the learning rate whatever the gradient, and would hide its scale.
COMMON = {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "num_train_epochs": 2, "save_strategy": "no"}
COMMON |= {"eval_strategy": "steps", "eval_steps": 3, "report_samples": 0}


def each(cases):
    """Run a test for these cases in both splits: most of the second ones in `make test-slow`."""
    params = [
        pytest.param(case, split, marks=pytest.mark.slow if is_slow(case, split) else ())
        for case in cases
        for split in SPLITS
    ]
    return pytest.mark.parametrize(("case", "split"), params)


def is_slow(case: str, split: str) -> bool:
    """Whether only `make test-slow` runs it."""
    return case in RARE or (split == "2x2x2" and case not in ACCUMULATED)


def wanted_runs(session, strategy: str | None = None) -> list[tuple[str, str]]:
    """Case and split of each test of this file that pytest runs, with `strategy` if it is given. Each once."""
    of_file = [
        item.callspec.params for item in session.items if item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    runs = [
        (params["case"], params["split"])
        for params in of_file
        if "case" in params and strategy in (None, params["two_processes"])
    ]
    return list(dict.fromkeys(runs))


def make_job(models, rows, folder: Path, case: str, size: int, steps: int) -> dict:
    layout, changes = CASES[case]
    if "training_data_path" in changes:
        changes = {**changes, "training_data_path": str(rows.parent / changes["training_data_path"])}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    if "max_tokens_per_batch" in changes:  # four batches a step, however many processes there are
        sizes = {"gradient_accumulation_steps": 4 if size == 8 else 2}
    return {
        "model_name_or_path": str(models[layout]),
        "training_data_path": str(rows),
        "validation_data_path": str(rows),
        "output_dir": str(folder),
        "per_device_eval_batch_size": size,
        **sizes,
        "dataloader_num_workers": 0,
        "environ": {"FSDP_TRANSFORMER_CLS_TO_WRAP": ""},
        **COMMON,
        **changes,
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


SAID = ("loss", "eval_loss", "supervised_tokens", "rank_imbalance")


def losses_of(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in SAID}


@pytest.fixture(scope="module")
def models(models, tmp_path_factory):
    """Layout or architecture → folder of its checkpoint."""
    root = tmp_path_factory.mktemp("architectures")
    return {**models, **{name: Case.make(name, root).folder for name in PACKED}}


@pytest.fixture(scope="module")
def one_process(request, tmp_path_factory, models, mixed_rows):
    """Case → folder of its run on this process alone, in batches of eight."""
    root = tmp_path_factory.mktemp("one")
    for case in dict.fromkeys(case for case, _ in wanted_runs(request.session)):
        job = make_job(models, mixed_rows, root / case, case, 8, 1)
        job.pop("environ")
        tuning.train(job)
    return root


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory, models, mixed_rows):
    """Folder with the same runs on two processes, in both splits."""
    root = tmp_path_factory.mktemp(request.param)
    jobs = [
        make_job(models, mixed_rows, root / f"{case} {split}", case, *SPLITS[split])
        for case, split in wanted_runs(request.session, request.param)
    ]
    unknown = make_job(models, mixed_rows, root / "unknown", "granite_vision full", 4, 1)
    jobs.append({**unknown, "environ": {"FSDP_TRANSFORMER_CLS_TO_WRAP": "GraniteDecoderLayer,MambaLayer"}})
    run_jobs(request.param, jobs, root)
    return root


@each(CASES)
def test_two_processes_train_what_one_does(case, split, one_process, two_processes):
    alone, together = one_process / case, two_processes / f"{case} {split}"
    expected, found = losses_of(alone), losses_of(together)
    if "max_tokens_per_batch" in CASES[case][1]:
        assert len(expected["loss"]) > 6
    else:
        assert len(expected["loss"]) == 6  # two epochs of 8 + 8 + 3 rows
    assert found["supervised_tokens"] == expected["supervised_tokens"]
    assert len(found["rank_imbalance"]) == len(found["loss"])
    assert min(found["rank_imbalance"]) >= 1
    assert max(found["rank_imbalance"]) <= 2
    assert not expected["rank_imbalance"]
    of_loss, of_weights = (5e-4, 2e-3) if case == "bf16" else (1e-5, 1e-4)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=of_loss, atol=0)
    torch.testing.assert_close(found["eval_loss"], expected["eval_loss"], rtol=of_loss, atol=0)
    torch.testing.assert_close(weights_of(together), weights_of(alone), rtol=0, atol=of_weights)
    assert (together / ".complete").exists()


@each(EXAMINED_CASES)
def test_two_processes_answer_what_one_does(case, split, one_process, two_processes):
    alone, together = (
        [json.loads(line) for line in (folder / "sample_predictions.jsonl").read_text().splitlines()]
        for folder in (one_process / case, two_processes / f"{case} {split}")
    )
    assert together == alone
    assert [line["step"] for line in alone] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    scores = [
        [line["eval_token_f1"] for line in map(json.loads, file.read_text().splitlines()) if "eval_loss" in line]
        for file in (f / "training_logs.jsonl" for f in (one_process / case, two_processes / f"{case} {split}"))
    ]
    assert scores[0] == pytest.approx(scores[1])
    assert len(scores[0]) == 2


def test_a_layer_class_that_the_model_lacks_is_answered_with_those_it_has(two_processes):
    for outcome in outcomes(two_processes / "unknown"):
        if two_processes.name.startswith("ddp"):
            assert outcome == "done"  # there is nothing to wrap
        else:
            assert "contains no MambaLayer" in outcome
            assert "choose from SiglipEncoderLayer, GraniteDecoderLayer" in outcome
