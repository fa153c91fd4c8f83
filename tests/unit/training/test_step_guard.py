"""What ends a run before the optimizer's step, and what stops it after one."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tuning.data.collator import BatchInfo
from tuning.errors import RunEnded, UserError
from tuning.training.step_guard import StepGuard, StepState


class OneProcess:
    accelerator = SimpleNamespace(optimizer_step_was_skipped=False)

    def all_gather_ints(self, numbers):
        return torch.tensor([numbers])

    def raise_on_all_ranks(self, error):
        if error is not None:
            raise error


@pytest.fixture
def step():
    state = StepState(number=1)
    state.begin(3, [BatchInfo(rows=["a"]), BatchInfo(rows=["b", "c"])], is_supervised=True, has_images=False)
    state.losses += [torch.tensor(1.0), torch.tensor(2.0)]
    return state


@pytest.fixture
def guard(step):
    training = SimpleNamespace(resume_from_checkpoint=None, output_dir="out")
    config = SimpleNamespace(training=training, lora=None, data=None)
    return StepGuard(config, step, OneProcess(), SimpleNamespace(check=lambda: ""))


def before_step(guard, model=None, **args):
    args = SimpleNamespace(**{"fp16": False, "deepspeed_plugin": None} | args)
    guard.on_pre_optimizer_step(args, None, None, model=model or torch.nn.Linear(2, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch(guard, step, value):
    step.losses[1] = torch.tensor(value)
    with pytest.raises(UserError, match=f"^b; c: the loss became {value} at step 3, before the optimizer's step"):
        before_step(guard)


def test_a_gradient_that_is_not_finite_names_all_rows_unless_a_scaler_skips_the_step(guard, step):
    step.grad_norm = torch.tensor(float("inf"))
    with pytest.raises(UserError, match=r"^a; b; c: the gradients became inf at step 3"):
        before_step(guard)
    before_step(guard, fp16=True)


def test_a_step_that_deepspeed_skipped_ends_the_run_unless_a_scaler_did(guard, monkeypatch):
    before_step(guard, deepspeed_plugin=object())
    monkeypatch.setattr(guard.processes.accelerator, "optimizer_step_was_skipped", True)
    with pytest.raises(UserError, match=r"^a; b; c: the gradients became NaN or infinite at step 3"):
        before_step(guard, deepspeed_plugin=object())
    before_step(guard, deepspeed_plugin=object(), fp16=True)


def test_parameters_that_no_batch_reached_get_a_gradient_of_zero(guard):
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    before_step(guard, model)
    assert torch.equal(model.weight.grad, torch.zeros(1, 2))
    assert model.bias.grad is None


def test_a_signal_stops_the_run_after_the_step_with_a_checkpoint(guard, step):
    guard.interruption.check = lambda: "SIGTERM"
    before_step(guard)
    state, control = TrainerState(global_step=3, max_steps=5), TrainerControl(should_evaluate=True)
    guard.on_step_end(None, state, control)
    assert (control.should_save, control.should_evaluate, control.should_training_stop) == (True, False, True)
    with pytest.raises(RunEnded, match="Stopped by SIGTERM after step 3 of 5: out/checkpoint-3 is complete"):
        guard.raise_if_stopped(state)
    guard.raise_if_stopped(TrainerState(global_step=5, max_steps=5))  # it was the last step anyway
