"""An optimizer or a schedule that cannot be made is named before the model is loaded."""

import pytest
from transformers import trainer_optimizer

from tuning.config.parse import build_config
from tuning.errors import UserError
from tuning.training.optimizer import check_optimizer


@pytest.fixture
def try_options(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    paths = {"model_name_or_path": tmp_path / "model", "training_data_path": tmp_path / "rows.json"}

    def check(**options) -> None:
        check_optimizer(build_config({**paths, "output_dir": tmp_path / "out", "use_cpu": True, **options}).training)

    return check


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 10, "warmup_steps": 3},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "constant"},
        {"learning_rate": 0},
    ],
)
def test_what_can_be_made_passes(try_options, options):
    try_options(**options)


@pytest.mark.parametrize(
    ("options", "start", "reason"),
    [
        ({"optim": "galore_adamw"}, "optim galore_adamw: cannot be used: ", "galore"),
        ({"optim": "grokadamw"}, "optim grokadamw: cannot be used: ", "pip install grokadamw"),
        ({"optim": "lomo"}, "optim lomo: cannot be used: ", "lomo"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "optim sgd: cannot be used: ", "much"),
        ({"optim_args": "nonsense"}, "optim adamw_torch_fused: cannot be used: ", "unpack"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, "lr_scheduler_type linear, lr_scheduler_kwargs: ", "min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
    ],
)
def test_what_cannot_be_made_is_one_message(try_options, options, start, reason):
    with pytest.raises(UserError) as caught:
        try_options(**options)
    assert str(caught.value).startswith(start)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(try_options, monkeypatch):
    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"^optim adamw_bnb_8bit: cannot be used: .*bitsandbytes"):
        try_options(optim="adamw_bnb_8bit")
