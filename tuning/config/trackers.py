"""Which experiment trackers `report_to` may name, and what each needs installed."""

import difflib
from collections.abc import Iterator
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

AIM = "aim"  # brings its own callback; Hugging Face has none for it
TRACKERS = (*INTEGRATION_TO_CALLBACK, AIM)
# Tracker → the module it needs, and the package that has it, where these are not called like the tracker.
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
NEEDS_NOTHING = ("kubeflow",)


def find_tracker_problems(report_to: str | list[str] | None) -> Iterator[str]:
    """What is wrong with `report_to`: names that are none, and packages that are missing."""
    asked_for = report_to if isinstance(report_to, list) else [report_to or "none"]
    for name in asked_for:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            close = difflib.get_close_matches(str(name), TRACKERS, n=1)
            yield f"report_to: {name!r} is unknown; " + (
                f"did you mean {close[0]}?" if close else f"use {', '.join(TRACKERS)}, all or none"
            )
        elif not is_installed(name):
            yield f"report_to: {name} is not installed; run pip install {PACKAGES.get(name, name)}"


def is_installed(tracker: str) -> bool:
    """Whether the package of a tracker is there."""
    modules = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (MODULES.get(tracker, tracker),)
    return tracker in NEEDS_NOTHING or any(find_spec(module) is not None for module in modules)
