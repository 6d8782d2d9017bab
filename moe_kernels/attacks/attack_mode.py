"""The mode in which a model is attacked: frozen, with a gradient for its input alone, and afterwards as it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from moe_kernels import _checks as check
from moe_kernels import _fsdp as fsdp
from moe_kernels._torch import buffers_of, parameters_of, without_ddp
from moe_kernels.attacks.lean import LeanMode, RecomputingMode

MODES = {"none": LeanMode, "activations": RecomputingMode}  # by recompute
_LOCKS = WeakIdKeyDictionary()  # by model


class attack_mode:  # noqa: N801, a context manager named as torch.no_grad is
    """Context manager that freezes a model and, on exit or exception, puts everything back exactly.

    Inside, every module is in eval mode, every parameter has requires_grad False and .grad None, and the model works
    on copies of its buffers. On exit, all training and requires_grad flags and the global random state (CPU and, once
    initialised, CUDA) are what they were, and .grad and buffers are the same tensors as before, never written to. The
    flags are set directly, so an overridden `train` or `eval` does not run. May be nested and reused. Lazy parameters
    and buffers that are initialised inside stay initialised.

    Threads that attack the same model take turns; threads whose models merely share modules do not. FSDP2
    modules are resharded on entry and on exit, and their gradients are left to FSDP2. FSDP1 drops the gradients that it
    holds when it is attacked, so step the optimizer first. DDP synchronises buffers with rank 0 once, on entry; inside,
    its processes are independent and may make unequal numbers of forwards.

    A forward inside keeps for its backward only what the gradient of its input needs (`moe_kernels.attacks.lean`). On
    a CPU it computes convolutions by Winograd's algorithm where that is faster, which rounds differently.

    Args:
        model: any module; a callable that is not a module is accepted, but has nothing to freeze.
        recompute: what the backward computes again instead of keeping it: "none", or "activations": the results of
            layer, group and rms norms and what is cheap to compute from them. Saves memory in a transformer and takes
            longer.

    Raises:
        ValueError: if model is not callable or recompute is unknown, or on entry if the model was made under
            torch.inference_mode.

    Example:
        with attack_mode(model):
            (grad,) = torch.autograd.grad(loss(model(x), y), [x])
    """

    def __init__(self, model: Callable[..., Any], recompute: str = "none") -> None:
        check.model(model)
        check.one_of("recompute", recompute, MODES)
        self.model, self.recompute = model, recompute
        self._restore: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(mode_of(self.model, self.recompute))
            self._restore.append(stack.pop_all())

    def __exit__(self, *exception: object) -> None:
        self._restore.pop().close()


def mode_of(model: Callable[..., Any], recompute: str) -> LeanMode:
    mode = MODES[recompute]()
    mode.frees_parameters = recompute != "none" and bool(fsdp.units(model))
    return mode


@contextmanager
def frozen(model: Callable[..., Any]) -> Iterator[None]:
    """The part of `attack_mode` that freezes and restores the model; forwards keep what torch keeps."""
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(_LOCKS.setdefault(model, RLock()))
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if isinstance(model, nn.Module):
            _freeze(model, stack)
        yield


def _freeze(model: nn.Module, stack: ExitStack) -> None:
    units = fsdp.units(model)
    _reshard(units)  # to freeze the shards: at each forward the whole parameters take their flags
    # Those that the units swap: FSDP2 may still reduce earlier gradients into theirs.
    sharded = {id(p) for unit in units for p in unit.parameters()}
    modules: list[tuple[nn.Module, bool, list[Any], list[Any]]] = []
    parameters: dict[int, tuple[Tensor, bool]] = {}
    gradients: list[tuple[Tensor, Tensor | None]] = []
    stack.callback(_thaw, modules, parameters, gradients)
    stack.callback(_reshard, units)
    # Copies of buffers, not saved values that are written back: a write raises a buffer's version (which batch norm's
    # own update does not) and would break a graph of the caller's that saved the buffer.
    copies: dict[int, Tensor | None] = {id(None): None}
    wrappers: list[DistributedDataParallel] = []
    detached: dict[int, Any] = {}  # in place of non-leaf tensors, which torch.func.functional_call has put there
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            wrappers.append(module)
        buffers = [(name, b) for name, b in buffers_of(module).items() if b is None or not is_lazy(b)]
        moving = [(name, p) for name, p in parameters_of(module).items() if p is not None and not p.is_leaf]
        modules.append((module, module.training, buffers, moving))
        if module.training:
            module.training = False
        for name, b in buffers:
            if id(b) not in copies:
                copies[id(b)] = b.detach().clone()  # type: ignore[union-attr]
            buffers_of(module)[name] = copies[id(b)]
        for name, p in moving:
            parameters_of(module)[name] = detached.setdefault(id(p), p.detach())
        for name, parameter in parameters_of(module).items():
            if id(parameter) in sharded:  # an exception in a forward may leave the whole parameter in its place
                stack.callback(_set_flag, module, name, parameter.requires_grad)
            if parameter is not None and id(parameter) not in parameters:
                if not is_lazy(parameter) and parameter.is_inference():
                    which = next(name for name, p in model.named_parameters() if p is parameter)
                    raise ValueError(f"model must be made outside torch.inference_mode, got {which} made inside")
                parameters[id(parameter)] = (parameter, parameter.requires_grad)
                parameter.requires_grad = False
                if id(parameter) not in sharded:
                    gradients.append((parameter, parameter.grad))
                    parameter.grad = None
    for ddp in wrappers:  # only now that buffers are replaced: rank 0's are written to the copies
        stack.enter_context(without_ddp(ddp))


def _reshard(units: list[Any]) -> None:
    """Replaces FSDP2's whole parameters with their shards."""
    for unit in units:
        unit.reshard()


def _set_flag(module: nn.Module, name: str, requires_grad: bool) -> None:
    parameters_of(module)[name].requires_grad = requires_grad


def _thaw(modules: list[Any], parameters: dict[int, tuple[Tensor, bool]], gradients: list[Any]) -> None:
    for p, requires_grad in parameters.values():
        p.requires_grad = requires_grad
    for p, grad in gradients:
        p.grad = grad
    for module, training, buffers, moving in modules:
        if module.training != training:
            module.training = training
        for tensors, before in ((buffers_of(module), buffers), (parameters_of(module), moving)):
            for name, tensor in before:
                tensors[name] = tensor
