"""Makes torchvision importable where its compiled operators do not fit the installed PyTorch."""

import importlib.machinery
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from tuning.errors import UserError, first_line

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Schemas of the operators that torchvision names while it is imported (its csrc/ops/nms.cpp)."""
KEPT: list[object] = []  # PyTorch forgets what a library defined once nobody holds it


class TorchvisionFinder(MetaPathFinder):
    """Prepares the import of torchvision, whoever imports it, and explains why it fails if it does."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        """Python asks every finder for every module, and libraries ask whether one is there."""
        spec = importlib.machinery.PathFinder.find_spec(name) if name == "torchvision" else None
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def prepare(module: ModuleType) -> None:
            define_missing_operators(spec)
            try:
                run(module)
            except (ImportError, RuntimeError, AttributeError, OSError) as error:
                raise not_importable(error) from error

        spec.loader.exec_module = prepare  # type: ignore[method-assign]
        return spec


def patch_torchvision_import() -> None:
    """Let `TorchvisionFinder` see the import of torchvision. Nothing is imported before that."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, TorchvisionFinder())


def define_missing_operators(spec: ModuleSpec) -> None:
    """Define the schemas of `OPERATORS` where torchvision's compiled library does not load beside this PyTorch.

    pip brings a torchvision for CUDA beside a PyTorch for CPUs, for example. `import torchvision` then fails, though
    its transforms, which processors use, need no operator. With a schema alone, an operator fails only when called.
    """
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    library = next((file for folder in folders for file in sorted(folder.glob("_C*.so"))), None)
    if library is None:
        return
    import torch

    try:
        torch.ops.load_library(library)
    except OSError:
        fragment = torch.library.Library("torchvision", "FRAGMENT")  # a part: others may define operators of this name
        for schema in OPERATORS:
            fragment.define(schema)
        KEPT.append(fragment)


def describe_torchvision() -> str:
    """That torchvision works without its operators; "" where it has them."""
    if not KEPT:
        return ""
    import torch

    return (
        f"torchvision {find_version()} was built for another PyTorch than {torch.__version__}."
        " Its image transforms work without its compiled operators."
    )


def not_importable(error: Exception) -> UserError:
    """The error where torchvision cannot be imported, with the version that fits the installed PyTorch.

    torchvision 0.N needs PyTorch 2.(N − 15): https://github.com/pytorch/vision#installation.
    """
    import torch

    minor = int(re.findall(r"\d+", torch.__version__)[1])
    return UserError(
        where=f"torchvision {find_version()}",
        problem=f"cannot be imported beside PyTorch {torch.__version__}: {first_line(error)}.",
        fix=f'Run pip install "torchvision==0.{minor + 15}.*".',
    )


def find_version() -> str:
    """The installed torchvision's version; "" where its files say none."""
    try:
        return importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return ""
