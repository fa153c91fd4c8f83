"""16-bit weights learn as float32 ones do, whatever the optimizer, and keep their storage."""

import io

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from tuning.training import optimizer
from tuning.training.optimizer import explain_updates, patch_master_weights

OPTIMIZERS = {
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-5, "fused": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 1e-5, "foreach": True}),
    "adamw one by one": (torch.optim.AdamW, {"lr": 1e-5, "foreach": False}),
    "sgd": (torch.optim.SGD, {"lr": 1e-4}),
    "sgd momentum": (torch.optim.SGD, {"lr": 1e-5, "momentum": 0.9}),
    "adafactor": (Adafactor, {"lr": 1e-5, "relative_step": False, "scale_parameter": False}),
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


def make_model(dtype: torch.dtype) -> nn.Sequential:
    """The same weights in every dtype: those that bfloat16 can hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    return model.to(torch.bfloat16).to(dtype)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 100) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(256, 32).to(next(model.parameters()).dtype)
    for _ in range(steps):
        ((model(inputs) - inputs[:, :1]) ** 2).float().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def masters_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[parameter]["master"] for parameter in model.parameters()]


@EVERY
def test_master_weights_learn_where_plain_bfloat16_stalls(name):
    make, settings = OPTIMIZERS[name]
    full, plain, kept = (make_model(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    start = flat(full.parameters())
    optimizer = patch_master_weights(make(kept.parameters(), **settings))
    learn(full, make(full.parameters(), **settings))
    learn(plain, make(plain.parameters(), **settings))
    learn(kept, optimizer)
    wanted = flat(full.parameters()) - start
    assert (flat(plain.parameters()) - start).norm() < 0.5 * wanted.norm()
    masters = flat(masters_of(kept, optimizer)) - start
    assert (masters - wanted).norm() < 0.05 * wanted.norm()  # what gradients in bfloat16 do
    assert torch.equal(flat(kept.parameters()), (masters + start).bfloat16().float())


def clone_in_float(model: nn.Module) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1, 2**26])
@EVERY
def test_masters_are_what_float32_weights_become_by_the_same_gradients(name, limit, dtype, monkeypatch):
    """Two groups with rates and decays of their own, a scheduler, clipped gradients."""
    monkeypatch.setattr("tuning.training.optimizer.NUMBERS_AT_ONCE", limit)
    make, settings = OPTIMIZERS[name]
    settings = {**settings, "lr": 1e-3}
    model = make_model(dtype)
    mine, twins = list(model.parameters()), clone_in_float(model)

    def optimizer_of(parameters):
        groups = [
            {"params": parameters[:1], "weight_decay": 0.1},
            {"params": parameters[1:], "weight_decay": 0.0, "lr": 1e-2},
        ]
        return make(groups, **settings)

    optimizer, reference = patch_master_weights(optimizer_of(mine)), optimizer_of(twins)
    pairs = [(each, torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, 5)) for each in (optimizer, reference)]
    places = [parameter.data_ptr() for parameter in mine]
    for step in range(6):
        torch.manual_seed(step)
        for parameter in mine:
            parameter.grad = torch.randn_like(parameter)
        nn.utils.clip_grad_norm_(mine, 0.5)
        for parameter, twin in zip(mine, twins, strict=True):
            twin.grad = parameter.grad.float()
        for each, scheduler in pairs:
            each.step()
            scheduler.step()
        for parameter, twin, master in zip(mine, twins, masters_of(model, optimizer), strict=True):
            torch.testing.assert_close(master, twin.data, rtol=0, atol=0)
            assert torch.equal(parameter.data, twin.data.to(dtype))
    assert [parameter.data_ptr() for parameter in mine] == places
    assert [group["params"] for group in optimizer.param_groups] == [mine[:1], mine[1:]]


@EVERY
def test_states_are_saved_and_loaded_exactly(name):
    make, settings = OPTIMIZERS[name]
    model, again = make_model(torch.bfloat16), make_model(torch.bfloat16)
    optimizer = patch_master_weights(make(model.parameters(), **settings))
    learn(model, optimizer, 5)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    again.load_state_dict(model.state_dict())
    continued = patch_master_weights(make(again.parameters(), **settings))
    continued.load_state_dict(torch.load(stored))
    torch.testing.assert_close(continued.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    learn(model, optimizer, 5)
    learn(again, continued, 5)
    torch.testing.assert_close(continued.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    assert torch.equal(flat(again.parameters()), flat(model.parameters()))


def test_states_of_plain_bfloat16_go_on_with_masters():
    model = make_model(torch.bfloat16)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
    learn(model, plain, 3)
    weights = flat(model.parameters())
    optimizer = patch_master_weights(torch.optim.AdamW(model.parameters(), lr=0.0))
    saved = plain.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(saved)
    learn(model, optimizer, 1)
    assert torch.equal(flat(masters_of(model, optimizer)), weights)
    state = optimizer.state[next(model.parameters())]
    assert (state["step"], state["exp_avg"].dtype) == (4, torch.float32)


def test_only_a_few_gradients_are_in_float32_at_once(monkeypatch):
    seen, take = [], optimizer._WithMasters._stand_in
    monkeypatch.setattr("tuning.training.optimizer.NUMBERS_AT_ONCE", 70)

    def count(self, masters, shares):
        seen.append(sorted(master.numel() for master in masters.values()))
        take(self, masters, shares)

    monkeypatch.setattr(optimizer._WithMasters, "_stand_in", count)
    model = make_model(torch.bfloat16)  # of 2048, 64, 64 and 1 numbers
    learn(model, patch_master_weights(torch.optim.AdamW(model.parameters())), 1)
    assert seen == [[2048], [64], [1, 64]]


class Counting(torch.optim.SGD):
    """Not PyTorch's own: its step may count steps, so that it must be one."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        super().step()


def test_an_optimizer_that_may_count_its_steps_takes_them_whole(monkeypatch):
    monkeypatch.setattr("tuning.training.optimizer.NUMBERS_AT_ONCE", 1)
    model = make_model(torch.bfloat16)
    optimizer = patch_master_weights(Counting(model.parameters(), lr=1e-3))
    learn(model, optimizer, 3)
    assert optimizer.steps == 3


def test_tied_weights_stay_tied_and_float32_weights_have_no_master():
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False).bfloat16(), nn.Linear(4, 4, bias=False).bfloat16()])
    tied[1].weight = tied[0].weight
    mixed = nn.Linear(4, 4)
    optimizer = patch_master_weights(torch.optim.SGD([*tied.parameters(), *mixed.parameters()], lr=1e-4, momentum=0.9))
    tied[1](tied[0](torch.ones(1, 4).bfloat16())).float().sum().backward()
    mixed(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert tied[1].weight.data_ptr() == tied[0].weight.data_ptr()
    assert torch.equal(tied[1].weight, optimizer.state[tied[0].weight]["master"].bfloat16())
    assert set(optimizer.state[mixed.weight]) == {"momentum_buffer"}


def test_nothing_changes_where_all_weights_are_float32():
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    assert type(patch_master_weights(optimizer)) is torch.optim.AdamW
    assert explain_updates(model, kept=True, sharded=False) == ""


def test_asking_twice_is_asking_once_and_what_happens_is_put_in_words():
    model = make_model(torch.bfloat16)
    optimizer = patch_master_weights(torch.optim.AdamW(model.parameters()))
    kind = type(optimizer)
    assert type(patch_master_weights(optimizer)) is kind
    assert isinstance(optimizer, torch.optim.AdamW)
    assert "2,177 trained numbers are bfloat16: the optimizer steps float32 copies" in explain_updates(
        model, kept=True, sharded=False
    )
    assert "below 1/512 of a number has no effect" in explain_updates(model, kept=False, sharded=False)
    assert "FSDP shards them in float32 and computes in bfloat16" in explain_updates(model, kept=True, sharded=True)
