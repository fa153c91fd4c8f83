"""Settings of other libraries that loading changes for a while come back, also after an error."""

import pytest
import transformers
from transformers.integrations import deepspeed

from tuning.model.load import silent_transformers, without_zero3


def fail_inside(context) -> None:
    with context:
        raise ZeroDivisionError


def test_transformers_warns_again_after_an_error():
    level = transformers.logging.get_verbosity()
    with silent_transformers():
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    with pytest.raises(ZeroDivisionError):
        fail_inside(silent_transformers())
    assert transformers.logging.get_verbosity() == level


def test_the_settings_of_deepspeed_come_back_after_an_error(monkeypatch):
    settings = object()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", settings)
    with without_zero3():
        assert deepspeed._hf_deepspeed_config_weak_ref is None
    with pytest.raises(ZeroDivisionError):
        fail_inside(without_zero3())
    assert deepspeed._hf_deepspeed_config_weak_ref is settings
