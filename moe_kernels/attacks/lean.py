"""Torch function modes under which a forward keeps only what its input gradient needs."""

from collections.abc import Callable, Sequence
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_kernels._recipes import Latest, Recipes
from moe_kernels._torch import (
    func_is_active,
    inside_checkpoint,
    inside_forward_mode,
    saved_tensor_hooks_are_allowed,
    tree_flatten,
    tree_unflatten,
    unsafe_view,
)
from moe_kernels.attacks.rules import RULES, is_small

# Norms keep their input, so neither their result nor what CHEAP functions compute from it need be kept.
NORMS = {F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.rms_norm, torch.rms_norm}
CHEAP = {
    *(F.linear, torch.ops.moe_kernels.expert_linear.default),
    *(Tensor.contiguous, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten),
    *(Tensor.roll, torch.roll, F.pad),
    *(Tensor.mul, torch.mul, Tensor.add, torch.add),
}
ATTENTION = {F.scaled_dot_product_attention}  # which keeps its result
RECORDED = NORMS | CHEAP | ATTENTION
PRODUCTS = {F.linear, torch.ops.moe_kernels.expert_linear.default, Tensor.mul, torch.mul}  # which keep their factors
# The longest recipe; without a limit, a chain of norms and linear maps would be computed from its start for each of
# them. At most half of the steps may lead to a norm's input, so that some are left for what follows the norm.
MOST_STEPS = 8

# Torch hands a call of these to the mode as a whole; these copies of their code hand over the calls inside instead.
OPENED = {
    f: FunctionType(f.__code__, {**f.__globals__, "has_torch_function": lambda _: False}, f.__name__, f.__defaults__)
    for f in [F.multi_head_attention_forward]
}
MATMULS = {torch.matmul, Tensor.matmul}


class LeanMode(TorchFunctionMode):
    """Context manager in which an operation in RULES follows its rule if only its first argument requires grad.

    Each call is judged on its own. Everything else runs as in torch alone: calls with arguments that a rule does not
    take (`out=`) or with a second argument that requires grad; tensor subclasses, sparse and complex tensors; whatever
    runs without grad mode, or under torch.compile, torch.func transforms or forward-mode differentiation; the inside
    of torch.utils.checkpoint, which may recompute on a thread without the mode; and what the mode does not see:
    TorchScript and other threads.
    """

    applied = False  # whether any rule has been followed
    frees_parameters = False  # whether a parameter may be gone when a recipe needs it, as under FSDP2

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = _by_rule(func, args, kwargs or {}) if func in RULES else NotImplemented
        if out is not NotImplemented:
            self.applied = True
            return out
        return func(*args, **kwargs) if kwargs else func(*args)


class RecomputingMode(LeanMode):
    """LeanMode in which the results of norms, and what is cheap to compute from them, are recomputed instead of kept.

    A recipe begins at what is kept anyway: the inputs of norms and the results of attention.
    """

    applied = True

    def __init__(self) -> None:
        super().__init__()
        self.recipes = Recipes(latest=Latest())

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if isinstance(func, MethodWrapperType):  # access to an attribute
            if func.__self__ is Tensor.data:  # through which values may change without a new version
                self.recipes.clear()
            return func(*args, **kwargs)
        known = func in RULES or func in RECORDED or func in OPENED
        if not (known or self.recipes) or not _applies():
            return func(*args, **kwargs)
        opened = self._opened(func, args, kwargs)
        if opened is not None:
            with self:
                return opened(*args, **kwargs)
        out = _by_rule(func, args, kwargs) if func in RULES else NotImplemented
        if out is NotImplemented:
            out = self._keeping_recipes(func, args, kwargs)
        if func in RECORDED:
            self._record(out, func, args, kwargs)
        return out

    def _opened(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """For a func that hides its steps from the mode, the same in steps that the mode sees."""
        if func not in MATMULS or len(args) != 2 or kwargs or not all(map(_is_plain, args)):
            return OPENED.get(func)
        x, y = args
        return _matmul if x.ndim == y.ndim > 3 and x.shape[:-2] == y.shape[:-2] else None

    def _keeping_recipes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.recipes and any(_is_plain(t) and self.recipes.find(t) for t in _tensors(args, kwargs)):
            with self.recipes.hooks():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(self, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records that out = func(*args, **kwargs), if this can be computed again from what is kept anyway."""
        recipes, tensors = self.recipes, _tensors(args, kwargs)
        if not (_is_plain(out) and out.requires_grad and all(map(_is_plain, tensors))):
            return
        if func in ATTENTION:
            recipes.add_source(out)
        if recipes.find(out) or recipes.is_source(out):
            return
        if func in NORMS and _only_first_needs_grad(tensors):
            source = recipes.find(tensors[0])
            if source is None or source.view.recipe.steps > MOST_STEPS // 2:
                recipes.add_source(tensors[0])

        others = tensors[1 + (func in PRODUCTS) :]  # which may change before the backward
        others = [t for t in others if t.is_floating_point() and not (t.requires_grad or isinstance(t, nn.Parameter))]
        if any(8 * t.numel() > out.numel() for t in others):
            return
        if self.frees_parameters and any(isinstance(t, nn.Parameter) for t in tensors):
            return
        moving = [t for t in tensors if t.requires_grad]
        sources = [recipes.find(t) for t in moving]
        reached = all(source or recipes.is_source(t) for source, t in zip(sources, moving, strict=True))
        if reached and sum(source.view.recipe.steps for source in sources if source) < MOST_STEPS:
            copies = {id(t): t.clone() for t in others}
            values, form = tree_flatten((args, kwargs))
            values = [copies.get(id(value), value) for value in values]

            def call(*values: Any) -> Tensor:
                args, kwargs = tree_unflatten(values, form)
                return func(*args, **kwargs)

            recipes.record(out, call, values)


def _by_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of func's rule, or NotImplemented if it does not apply."""
    rule, x = RULES[func], args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor):
        return NotImplemented
    try:
        if is_small(rule, x, args) or not _applies() or not _only_first_needs_grad(_tensors(args, kwargs)):
            return NotImplemented
        return rule(func, *args, **kwargs)
    except TypeError:  # arguments that the rule does not take; if func refuses them too, its own error is raised
        return NotImplemented


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for equal batch dimensions, as torch computes it."""
    z = torch.bmm(x.flatten(0, -3), y.flatten(0, -3))
    return unsafe_view(z, (*x.shape[:-1], y.shape[-1]))


def _applies() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not func_is_active()
        and not inside_checkpoint()
        and not inside_forward_mode()
        and saved_tensor_hooks_are_allowed()
    )


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def _is_plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided


def _only_first_needs_grad(tensors: Sequence[Tensor]) -> bool:
    if not tensors:
        return False
    first, *others = tensors
    return (
        _is_plain(first)
        and first.requires_grad
        and first.is_floating_point()
        and all(_is_plain(t) and not t.requires_grad for t in others)
    )
