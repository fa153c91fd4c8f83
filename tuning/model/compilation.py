"""`torch.compile` of a model's layers, one by one, for batches whose lengths change at every step."""

from collections.abc import Collection

from torch import nn


def compile_layers(model: nn.Module, class_names: Collection[str], *, backend: str, mode: str | None) -> int:
    """Compile every layer of these classes where it is, under the name it has; returns how many there are.

    Layers of one class share their code, so that it is compiled once; with dynamic sizes, once for all lengths. The
    rest of the model (joining text and images, the loss) selects by values and would break a graph anyway.
    """
    layers = [module for module in model.modules() if {kind.__name__ for kind in type(module).__mro__} & {*class_names}]
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)
