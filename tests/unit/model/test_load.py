"""Loading: settings of other libraries come back afterwards, also after an error, and a missing package is named."""

import pytest
import transformers
from architectures.checkpoints import build, save
from transformers.integrations import deepspeed
from transformers.utils import import_utils

from tuning.config.options import ModelSource
from tuning.errors import UserError
from tuning.model.load import build_skeleton, load_config, load_processor, silent_transformers, without_zero3


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


@pytest.mark.parametrize("name", ["perception_lm", "fast_vlm", "gemma3n"])
def test_a_tower_of_a_package_that_is_missing_names_it(name, monkeypatch):
    config = build(name).config
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, import_utils.TIMM_IMPORT_ERROR))
    with pytest.raises(UserError) as refused:
        build_skeleton(config)
    message = str(refused.value)
    assert "the model cannot be built: TimmWrapperModel requires the timm library" in message
    assert message.endswith("Install this package.")


def test_a_processor_of_a_package_that_is_missing_names_it(tmp_path, monkeypatch):
    save("smolvlm", tmp_path)
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    source = ModelSource(model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="its processor cannot be loaded: Package `num2words` is required"):
        load_processor(source, load_config(source))
