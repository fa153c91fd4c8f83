"""docs/plan-a-large-run.md: its tables are the results and the arithmetic, and the arithmetic is what a run does."""

import importlib.util
import json

import plan
import pytest
import torch
import torch.distributed as dist
from docs_text import ROOT
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import tuning
from tuning.distributed.fsdp import padded_numel
from tuning.files import OPTIMIZER_FILE

BF16 = {"dtype": "bfloat16", "max_steps": 1, "save_steps": 1}
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_plan", ROOT / "docs" / "generate_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_group():
    """Process 0 of 64."""
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_the_tables_are_current(generator):
    page = generator.PAGE.read_text("utf-8")
    assert page == generator.render(page), f"run: {generator.COMMAND}"
    assert all(f"<!-- {name} -->" in page for name in generator.TABLES)


def test_an_estimate_is_the_committed_one(generator, capsys):
    plan.main(["--model", "llava_7b", "--method", "lora", "--gpus", "8"])
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    committed = generator.read_plan()["llava_7b", "lora"][8]
    exact = ("parameters", "trained", "gathered_bytes", "reduced_bytes", "tokens", "flops", "gradients", "optimizer")
    assert {name: line[name] for name in exact} == {name: committed[name] for name in exact}
    assert line["peak"] == pytest.approx(committed["peak"], rel=0.03)  # other versions of transformers


def test_the_strategy_is_the_first_that_fits_surely(generator):
    def choose(gpus: int, one: float, gradients: float, shards: dict[int, float], method: str = "lora") -> str:
        lines = {1: {"method": method, "peak": one * 1e9, "gradients": gradients * 1e9}}
        return generator.choose_strategy(lines | {n: {"peak": size * 1e9} for n, size in shards.items()}, gpus)

    assert choose(1, 50, 0, {}) == "one GPU"
    assert choose(1, 73, 0, {}) == "does not fit"
    assert choose(64, 50, 5, {8: 9, 64: 8}) == "DDP"
    assert choose(64, 60, 9, {8: 65, 64: 65}) == "DDP, tight"
    assert choose(64, 60, 20, {8: 50, 64: 8}) == "hybrid"
    assert choose(64, 60, 20, {8: 50, 64: 8}, "full") == "full shard"
    assert choose(64, 60, 20, {8: 60, 64: 8}) == "full shard"
    assert choose(64, 60, 20, {8: 60, 64: 59}) == "hybrid, tight"
    assert choose(8, 60, 20, {8: 80}) == "does not fit"


@pytest.mark.parametrize(("method", "summed"), [("full", 200), ("lora", 100)])
def test_a_gpu_gets_what_it_lacks(generator, method, summed):
    line = {"method": method, "gpus": 4, "gathered_bytes": 400, "reduced_bytes": 100}
    assert generator.shard_bytes(line) == 2 * 300 + summed * 3 / 4
    assert generator.ddp_bytes({1: line}, 4) == 2 * 75


def test_first_dimensions_are_padded():
    assert padded_numel(torch.empty(16, 10), 1024) == 1024 * 10
    assert padded_numel(torch.empty(2048, 10), 1024) == 2048 * 10
    assert padded_numel(torch.empty(17), 8) == 24
    assert padded_numel(torch.empty(()), 8) == 8


def test_fsdp2_pads_them_so(fake_group):
    """FSDP2's own sizes, on process 0 of 64 of which the others do not exist."""
    weights = nn.Linear(10, 16), nn.Linear(64, 70, bias=False)
    for layer in weights:
        fully_shard(layer, mesh=init_device_mesh("cpu", (64,)))
        for parameter in layer._get_fsdp_state()._fsdp_param_group.fsdp_params:
            whole = torch.empty(parameter._orig_size)
            assert 64 * parameter._sharded_param_data.numel() == padded_numel(whole, 64)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_has_the_bytes_of_the_page(generator, method, make_options, trainers):
    options = make_options("llava15", **BF16, **(LORA if method == "lora" else {}))
    tuning.train(options)
    parameters = list(trainers[-1].trainable.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    line = {"method": method, "trained": trained, "parameters": sum(parameter.numel() for parameter in parameters)}

    folder = f"{options['output_dir']}/checkpoint-1"
    name = "adapter_model" if method == "lora" else "model"
    weights = load_file(f"{folder}/{name}.safetensors").values()
    states = torch.load(f"{folder}/{OPTIMIZER_FILE}")["state"]
    averages = [tensor for tensor in tree_leaves(states) if isinstance(tensor, torch.Tensor) and tensor.dim()]
    written = sum(tensor.nbytes for tensor in [*weights, *averages])
    assert written == generator.checkpoint_bytes(line, sharded=False)
