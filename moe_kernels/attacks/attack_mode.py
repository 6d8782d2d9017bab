"""The mode in which a model is attacked: it stands still, only its input gets a gradient, and no trace is left."""

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
    on copies of its buffers. On exit every module has its own training flag again, every parameter its requires_grad
    and its very .grad, every buffer name its very tensor, which was never written to, and the global random state (CPU
    and, once initialised, CUDA) is what it was. The flags are set directly, so an overridden `train` or `eval` does not
    run. May be nested and reused. Lazy parameters and buffers that are initialised inside stay initialised. Threads
    attack the same model one after the other; models that share modules are not known to be one. What FSDP2
    shards is sharded again on entry and on exit; its gradients are left to it. FSDP1 drops the gradients that it holds
    when it is attacked: take the optimizer's step before. DDP takes rank 0's buffers once, on entry; what the processes
    do inside, however often, is their own.

    A forward inside keeps for its backward only what the gradient of its input needs (`moe_kernels.attacks.lean`), and
    on a CPU computes convolutions by Winograd's algorithm where that is faster, which rounds otherwise.

    Args:
        model: any module; a callable that is no module has nothing to freeze.
        recompute: what the backward computes again instead of keeping it: "none"; "activations", the results of layer,
            group and rms norms and what is cheap to compute from them, which costs a transformer time.

    Raises:
        ValueError: if recompute is unknown, or on entry if the model was made under torch.inference_mode.

    Example:
        with attack_mode(model):
            (grad,) = torch.autograd.grad(loss(model(x), y), [x])
    """

    def __init__(self, model: Callable[..., Any], recompute: str = "none") -> None:
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
    mode.frees_parameters = bool(fsdp.units(model))
    return mode


@contextmanager
def frozen(model: Callable[..., Any]) -> Iterator[None]:
    """attack_mode but for what a forward keeps."""
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(_LOCKS.setdefault(model, RLock()))
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if isinstance(model, nn.Module):
            _freeze(model, stack)
        yield


def _freeze(model: nn.Module, stack: ExitStack) -> None:
    fsdp.reshard(model)  # what is frozen are the shards, whose flags the whole parameters take at each forward
    sharded = {id(p) for p in fsdp.parameters(model)}  # into whose gradients FSDP2 may reduce what is left of earlier
    modules: list[tuple[nn.Module, bool, list[Any], list[Any]]] = []
    parameters: dict[int, tuple[Tensor, bool]] = {}
    gradients: list[tuple[Tensor, Tensor | None]] = []
    stack.callback(_thaw, modules, parameters, gradients)
    stack.callback(fsdp.reshard, model)
    # A copy instead of saving and restoring values: batch norm writes its statistics without raising their version,
    # and writing them back would raise it under a graph of the caller's that saved them.
    copies: dict[int, Tensor | None] = {id(None): None}
    wrappers: list[DistributedDataParallel] = []
    detached: dict[int, Any] = {}  # of what torch.func.functional_call has put there
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
            if id(parameter) in sharded:  # an exception in a forward may leave the whole one in its place
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
    for ddp in wrappers:  # after buffers have been replaced: rank 0's are written to the copies
        stack.enter_context(without_ddp(ddp))


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
