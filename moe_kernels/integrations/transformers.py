"""Runs the experts of transformers' mixtures by this package's operators: `experts_implementation="moe_kernels"`.

y[t] = sum over i of weights[t, i] * down[e](gate(up[e](x[t]))) with e = experts[t, i]; an id e >= E adds nothing.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import _checks as check
from moe_kernels._torch import autocast_dtype
from moe_kernels.backends import is_implemented
from moe_kernels.nn.recompute import Recomputing, recomputed
from moe_kernels.ops import combine, expert_linear, group_by_expert
from moe_kernels.ops.expert_mlp import activate, expert_mlp_output
from moe_kernels.ops.expert_sum import index_sum

NAME = "moe_kernels"
MIN_VERSION = (5, 24)
RECOMPUTE = ("activations", "all")
# The class or function that a model calls, and the operators' name for it; any other is called as it is.
NAMES: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu", nn.SiLU: "silu", nn.ReLU: "relu"}
GATED: dict[Any, str] = {"silu": "swiglu", "gelu": "geglu"}


def register(recompute: str = "all") -> None:
    """Makes `experts_implementation="moe_kernels"` known to transformers.

    For frozen weights no gradient is computed, and nothing is saved for one. From then on `from_pretrained` and
    `set_experts_implementation` raise if a model without mixtures is given the name, which transformers would ignore.

    Args:
        recompute: "all" saves only the rows' hidden states, and computes each slot's first linear map and activation
            again in the backward; "activations" also saves the linear map's result, for a faster backward.

    Example:
        register()
        model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_kernels")
        model.set_experts_implementation("moe_kernels")  # or later

    Raises:
        ImportError: if transformers is not installed or older than 5.24.
        ValueError: if recompute is unknown; in the two methods, if the model has no mixture that uses transformers'
            interface for experts.
    """
    check.one_of("recompute", recompute, RECOMPUTE)
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers >= 5.24 must be installed: pip install 'moe_kernels[transformers]'") from error
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < MIN_VERSION:
        raise ImportError(f"transformers must be 5.24 or newer, got {transformers.__version__}")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, functools.partial(experts_forward, recompute=recompute))
    _refuse_models_without_mixtures(transformers.PreTrainedModel)


@functools.cache
def _refuse_models_without_mixtures(base: Any) -> None:
    """Only in the two methods by which users choose an implementation: transformers also makes a model's parts with
    that choice, and some parts have no mixture."""
    load, choose = base.from_pretrained.__func__, base.set_experts_implementation

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config._experts_implementation == NAME:
            _mixtures(model)
        return loaded

    @functools.wraps(choose)
    def set_experts_implementation(self: Any, experts_implementation: str | dict[str, str]) -> None:
        if experts_implementation == NAME:
            _mixtures(self)
        choose(self, experts_implementation)

    base.from_pretrained = classmethod(from_pretrained)
    base.set_experts_implementation = set_experts_implementation


Routes = dict[str, tuple[Tensor, Tensor]]  # {name of a mixture's experts: (experts, weights), both [T, k]}


class SoftPrompt(nn.Module):
    """A causal language model as a function of its prompt's embeddings, which can be attacked: maps x [B, P, H],
    followed by the embeddings of `tokens`, to the logits [B, V] of the next token.

    Args:
        model: a causal language model of transformers.
        tokens: int64 [S], what follows the prompt in every sample; None for nothing.
    """

    def __init__(self, model: nn.Module, tokens: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("tokens", tokens, persistent=False)

    def route(self, x: Tensor) -> Routes:
        """Where the model's mixtures send x: experts and weights of each.

        Raises:
            ValueError: if the model has no mixture that uses transformers' interface for experts.
        """
        routes: Routes = {}

        def read(name: str, x: Tensor, experts: Tensor, weights: Tensor) -> None:
            routes[name] = experts, weights

        with _before_experts(self.model, read):
            self(x)
        return routes

    def forward(self, x: Tensor, routing: Routes | None = None) -> Tensor:
        """The logits [B, V]; with `routing`, a result of `route`, the mixtures send their rows where it says.

        Raises:
            ValueError: if x is no embeddings, `routing` is for another number of rows, or the model has no mixtures.
        """
        embed = self.model.get_input_embeddings()  # type: ignore[operator]
        check.tensor("x", x, "a tensor")
        if not x.is_floating_point() or x.ndim != 3 or x.shape[2] != embed.weight.shape[1]:
            raise ValueError(
                f"x must be embeddings [B, P, {embed.weight.shape[1]}], as model.get_input_embeddings() makes them of "
                f"token ids, got {check.describe(x)}"
            )
        x = x.to(embed.weight.dtype)
        if self.tokens is not None:
            x = torch.cat([x, embed(self.tokens).expand(len(x), -1, -1)], 1)

        def force(name: str, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            forced = routing[name]  # type: ignore[index]
            if forced[0].shape != experts.shape:
                raise ValueError(f"routing must be for {len(experts)} rows, got {len(forced[0])}")
            return x, *forced

        with nullcontext() if routing is None else _before_experts(self.model, force):
            return self.model(inputs_embeds=x, use_cache=False).logits[:, -1]


def _mixtures(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the experts of every mixture in a model."""
    modules = [(name, module) for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")]
    if not modules:
        found = type(model).__name__
        raise ValueError(f"model must have mixtures that use transformers' interface for experts, got {found}")
    return modules


@contextmanager
def _before_experts(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Inside, hook(name, hidden states, experts, weights) sees, or replaces, what each mixture's experts receive."""
    with ExitStack() as stack:
        for name, module in _mixtures(model):
            handle = module.register_forward_pre_hook(lambda _, args, name=name: hook(name, *args))
            stack.callback(handle.remove)
        yield


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, recompute: str = "all"
) -> Tensor:
    """A mixture's experts on hidden_states [T, H], with top_k_index and top_k_weights [T, k] -> [T, H].

    `self` is a module that transformers' `use_experts_implementation` decorates. What the operators cannot compute runs
    in the model's own code, with one warning that says why.
    """
    reason = _unsupported(self, hidden_states)
    if reason is not None:
        _warn(type(self).__name__, reason)
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    with Recomputing(self, recompute == "all"):
        if not _may_be_foreign(self, top_k_index):
            y = _mixture(self, hidden_states, top_k_index, top_k_weights)
        else:
            num_rows, k = top_k_index.shape
            slots = (top_k_index.flatten() < self.num_experts).nonzero().squeeze(1)
            rows = (slots // k).int()
            experts, weights = (x.flatten().index_select(0, slots)[:, None] for x in (top_k_index, top_k_weights))
            y = index_sum(_mixture(self, hidden_states, experts, weights, rows), rows, num_rows)
    return y.to(hidden_states.dtype)


def _mixture(self: Any, x: Tensor, experts: Tensor, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """x [T, H], experts and weights [S, k] -> [S, H]; row s reads x[rows[s]], or x[s] if rows is None."""
    order, position, offsets = group_by_expert(experts, self.num_experts)
    row = order // experts.shape[1]
    source = row if rows is None else rows.index_select(0, row)
    up, up_bias = _map(self, "gate_up_proj" if self.has_gate else "up_proj")
    down, down_bias = _map(self, "down_proj")
    z = recomputed(lambda x, up, up_bias: expert_linear(x, up, up_bias, offsets, source), x, up, up_bias)
    activation = activation_of(self)
    if self.has_post_expert_norm or _learns(self, activation):
        y = expert_linear(activate(z, activation), down, down_bias, offsets)
        return combine(self.post_expert_norm(y) if self.has_post_expert_norm else y, weights, position)
    return expert_mlp_output(z, down, down_bias, offsets, activation, weights, position, row)


def _map(self: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [E, out, in] and bias [E, out] of a linear map per expert."""
    weight = getattr(self, name)
    bias = getattr(self, f"{name}_bias") if self.has_bias else None
    return weight.transpose(1, 2) if self.is_transposed else weight, bias


def activation_of(self: Any) -> str | Callable[[Tensor], Tensor]:
    """The activation between the two linear maps: the operators' name for it, or the model's own function."""
    from transformers import activations
    from transformers.integrations.moe import _default_apply_gate

    if not self.has_gate or type(self)._apply_gate is _default_apply_gate:
        function = self.act_fn
        if isinstance(function, activations.GELUActivation):
            function = function.act
        known = NAMES | {activations.SiLUActivation: "silu", activations.ReLUSquaredActivation: "relu2"}
        name = known.get(type(function) if isinstance(function, nn.Module) else function)
        if self.has_gate:
            name = GATED.get(name)
        if name is not None:
            return name
    return self._apply_gate if self.has_gate else self.act_fn


def _learns(self: Any, activation: str | Callable[[Tensor], Tensor]) -> bool:
    """Whether the activation is the model's own function and has parameters that are trained."""
    function = getattr(self, "act_fn", None)
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return callable(activation) and any(p.requires_grad for p in parameters)


def _may_be_foreign(self: Any, experts: Tensor) -> bool:
    """Whether slots may belong to other processes' experts. The ids themselves tell, except on a GPU, which is not
    waited for: there transformers' flag does."""
    if check.may_read(experts):
        return bool((experts >= self.num_experts).any())
    return self._is_expert_parallel


def _unsupported(self: Any, x: Tensor) -> str | None:
    """Why the operators cannot run these experts on x, or None."""
    weight = self.gate_up_proj if self.has_gate else self.up_proj
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the weights are of type {type(weight).__name__}"
    if x.device.type != "meta" and not is_implemented("expert_linear", x.device.type):
        return f"there are no kernels for {x.device.type} in this build"
    if autocast_dtype(weight) != autocast_dtype(x):
        return f"the weights are {weight.dtype} and the hidden states {x.dtype}"
    if not weight.is_floating_point() or weight.itemsize == 1:
        return f"the weights are {weight.dtype}"
    if x.is_cuda and x.dtype == torch.float64:
        return "float64 has no kernels on a GPU"
    return None


@functools.cache
def _warn(name: str, reason: str) -> None:
    warnings.warn(f"{name} runs without moe_kernels: {reason}", RuntimeWarning, stacklevel=4)
