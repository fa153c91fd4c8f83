"""The states of every generator that training may draw from, on one process."""

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """As they are now, as `torch.save` takes them."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    states = {"python": random.getstate(), "numpy": numpy_state, "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo of `random_states`."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
