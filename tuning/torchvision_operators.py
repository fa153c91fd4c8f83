"""Makes torchvision importable where its compiled operators do not fit the installed PyTorch."""

import importlib.machinery
import importlib.metadata
import multiprocessing
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

from tuning.console import print0

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Schemas of the operators that torchvision names while it is imported (its csrc/ops/nms.cpp)."""
KEPT: list[object] = []  # PyTorch forgets what a library defined once nobody holds it


class TorchvisionFinder(MetaPathFinder):
    """Calls `define_missing_operators` before the first import of torchvision, whoever imports it. It finds nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Python asks every finder for every module."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            define_missing_operators()


def patch_torchvision_import() -> None:
    """Let `TorchvisionFinder` see the first import of torchvision. PyTorch is not imported before that."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, TorchvisionFinder())


def define_missing_operators() -> None:
    """Define the schemas of `OPERATORS` where torchvision's compiled library does not load beside this PyTorch.

    pip brings a torchvision for CUDA beside a PyTorch for CPUs, for example. `import torchvision` then fails, though
    its transforms, which processors use, need no operator. With a schema alone, an operator fails only when called.
    """
    library = find_library()
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
        if multiprocessing.parent_process() is None:
            print0(
                f"torchvision {importlib.metadata.version('torchvision')} was built for another PyTorch than"
                f" {torch.__version__}. We use its image transforms, which work without its compiled operators."
            )


def find_library() -> Path | None:
    """The compiled operators of the installed torchvision; None where there are none."""
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("_C*.so"))), None)


def why_not_importable() -> str:
    """Why torchvision cannot be imported, and which version fits the installed PyTorch; "" where it can be.

    torchvision 0.N needs PyTorch 2.(N − 15): https://github.com/pytorch/vision#installation.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        minor = int(re.match(r"\d+\.(\d+)", torch.__version__)[1])  # type: ignore[index]
        return (
            f"torchvision cannot be imported ({str(error).splitlines()[0]}). Your PyTorch is {torch.__version__}:"
            f' pip install "torchvision==0.{minor + 15}.*"'
        )
    return ""
