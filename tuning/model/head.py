"""The output head: the stock code from the last hidden states to logits, run for chosen positions only."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tuning.errors import UserError, describe_failure, try_optional
from tuning.model.load import without_zero3

LEFT_OUT = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
"""Settings of a text model's logits that vision-language wrappers are known to leave out, and the value without effect.

Since transformers 4.52 `LlavaNextForConditionalGeneration` does not divide by Granite's `logits_scaling`, and
`AyaVisionForConditionalGeneration` and `Cohere2VisionForConditionalGeneration` do not multiply by Cohere's
`logit_scale`, though these models were trained and are served with them.
"""


MASKED = -1e30  # models write the lowest number of a dtype, or -inf


@dataclass(frozen=True)
class HeadCode:
    """The end of the forward of `owner`, after its child `body_name`: it runs the child `head_name` among other things.

    Models scale, cap, cut or mask what the head gives, or the hidden states that it gets. `owner` may be a skeleton.
    """

    owner: PreTrainedModel
    body_name: str
    head_name: str

    @property
    def body(self) -> Any:
        return self.owner._modules[self.body_name]

    @property
    def head(self) -> Any:
        return self.owner._modules[self.head_name]

    def run(self, head: Any, last_hidden_state: torch.Tensor, router_logits: Any = None, **inputs: Any) -> Any:
        """What the forward of `owner` returns with `head` as its head and a body that gives `last_hidden_state`."""
        body = StandIn(self.body, lambda *args, **kwargs: _BodyOutput(last_hidden_state, router_logits))
        return self.run_with(body, head, inputs_embeds=last_hidden_state, **inputs)

    def run_with(self, body: Any, head: Any, *args: Any, **inputs: Any) -> Any:
        """Run the forward of `owner` with another body and another head.

        It runs on an object that shares everything else with `owner`, so that neither `owner` nor the hooks of its
        wrappers notice. `__new__` and `__init__` do not run: FSDP replaces them.
        """
        shared = {name: value for name, value in vars(self.owner).items() if name != "forward"}
        twin = object.__new__(type(self.owner))
        twin.__dict__.update(shared, _modules={**self.owner._modules, self.body_name: body, self.head_name: head})
        return type(self.owner).forward(twin, *args, **inputs)


class StandIn:
    """Called in place of `module`, whose attributes it has."""

    def __init__(self, module: Any, call: Callable[..., Any]):
        self.__dict__.update(module=module, call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _BodyOutput:
    """The output of a body. Whatever else the forward asks it for (a cache, hidden states of layers) is None."""

    def __init__(self, last_hidden_state: torch.Tensor, router_logits: Any):
        self.last_hidden_state, self.router_logits = last_hidden_state, router_logits

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class OutputHead:
    """How a model's logits are made.

    `stock`: the code of the model's own forward. `used`: the same, or that of the text model's `…ForCausalLM` where the
    stock code leaves out the settings in `left_out`, by name.
    """

    stock: HeadCode
    used: HeadCode
    left_out: dict[str, float] = field(default_factory=dict)

    def logits(self, head: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` of the last hidden states `[N, H]`. `head` is called in place of the model's own."""
        return self.used.run(head, hidden[:, None]).logits[:, 0]

    def stock_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` as the stock forward has them, with what it leaves out."""
        return self.stock.run(self.stock.head, hidden[:, None]).logits[:, 0]

    def describe(self) -> str:
        """What is left out of the stock logits, and put back, as a line that a run prints."""
        settings = " and ".join(f"{name} {value:g}" for name, value in self.left_out.items())
        stock, used = type(self.stock.owner).__name__, type(self.used.owner).__name__
        return f"Logits: the forward of {stock} leaves out {settings}. We apply it as {used} does."


def find_head(model: PreTrainedModel) -> OutputHead:
    """Find the body, the output head and the code between. Raises `UserError` where they are not known to be right."""
    stock = find_code(model)
    if stock is None:
        raise UserError(
            problem=f"{type(model).__name__} has no separate body and output head, so it cannot be trained here.",
            fix="Choose another model.",
        )
    alone = try_optional(lambda: make_up_logits(stock))
    if alone.error:
        raise UserError(
            problem=f"the output head of {type(model).__name__} cannot run alone: {describe_failure(alone.error)}.",
            fix="Choose another model.",
        ) from alone.error
    config = model.config.get_text_config()
    text = find_text_code(config)
    if text is None or isinstance(stock.owner, type(text.owner)) or compute_alike(stock, text):
        return OutputHead(stock, stock)
    left_out = {name: value for name in LEFT_OUT if (value := getattr(config, name, None)) not in (None, 1.0)}
    without = find_text_code(_without(config, left_out)) if left_out else None
    if without is None or not compute_alike(stock, without):
        raise UserError(
            problem=(
                f"{type(model).__name__} computes other logits than its text model {type(text.owner).__name__}, by up "
                f"to {largest_difference(stock, text):.3g} standard deviations, and we do not know which are right."
            ),
            fix="Choose another model, or a version of transformers in which the two agree.",
        )
    return OutputHead(stock, text, left_out)


def find_code(model: PreTrainedModel) -> HeadCode | None:
    """The model itself, or the first causal model inside it, whose children are a body and the output head."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        head = module.get_output_embeddings()
        body = module.base_model if module.base_model is not module else _find_body(module, head)
        names = {id(child): name for name, child in module._modules.items()}
        if id(head) in names and id(body) in names:
            return HeadCode(module, names[id(body)], names[id(head)])
    return None


def _find_body(module: PreTrainedModel, head: nn.Module | None) -> nn.Module | None:
    """The one child model that is not the head: Llama 4's text model is not called as its `base_model_prefix` says."""
    children = [child for child in module.children() if isinstance(child, PreTrainedModel) and child is not head]
    return children[0] if len(children) == 1 else None


def find_text_code(config: PreTrainedConfig) -> HeadCode | None:
    """The code of the text model's own `…ForCausalLM`, without weights; None where transformers has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None

    def build() -> PreTrainedModel:
        with without_zero3(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))

    text = try_optional(build).value
    return None if text is None else find_code(text)


def _without(config: PreTrainedConfig, settings: dict[str, float]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for name in settings:
        setattr(config, name, LEFT_OUT[name])
    return config


def make_up_logits(code: HeadCode) -> torch.Tensor:
    """Logits of made-up hidden states with a made-up head: no weights are needed."""
    generator = torch.Generator().manual_seed(0)
    config = code.owner.config.get_text_config()
    hidden = 10 * torch.randn(4, 1, config.hidden_size, generator=generator, dtype=torch.float64)
    vocabulary = getattr(code.head, "out_features", config.vocab_size)
    weights = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return code.run(StandIn(code.head, lambda hidden: hidden[..., :1] * weights), hidden).logits


def compute_alike(code: HeadCode, other: HeadCode) -> bool:
    """Whether both make the same logits of made-up hidden states."""
    return largest_difference(code, other) <= 1e-5


def largest_difference(code: HeadCode, other: HeadCode) -> float:
    """The largest difference between the logits that both make of made-up hidden states."""
    return measure_distance(make_up_logits(code), make_up_logits(other))


def measure_distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations of the `expected` logits. Masked ones must be masked in both.

    So must those that are NaN or infinite: they end the first step with an error of their own.
    """
    logits, expected = logits.double(), expected.double()
    counts = [values.isfinite() & (values > MASKED) for values in (logits, expected)]
    if not torch.equal(*counts):
        return math.inf
    difference = (logits - expected)[counts[0]].abs()
    return (difference.max() / expected[counts[0]].std().clamp(min=1e-12)).item() if len(difference) > 1 else 0.0


@contextmanager
def record_inner_body(code: HeadCode) -> Iterator[list[Any]]:
    """A list that grows with each output of the body of an inner causal model, which makes no logits meanwhile."""
    outputs: list[Any] = []

    def run_body(*args: Any, **kwargs: Any) -> Any:
        outputs.append(code.body(*args, **kwargs))
        return outputs[-1]

    body, no_head = StandIn(code.body, run_body), StandIn(code.head, lambda hidden: hidden[..., :1])
    code.owner.forward = lambda *args, **kwargs: code.run_with(body, no_head, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield outputs
    finally:
        del code.owner.forward
