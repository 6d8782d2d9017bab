"""The mode in which a model is attacked: it stands still, only its input gets a gradient, and no trace is left."""

from collections.abc import Callable
from contextlib import ExitStack
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from moe_kernels.attacks.lean import LeanMode

_LOCKS = WeakIdKeyDictionary()  # by model


class attack_mode:  # noqa: N801, a context manager named as torch.no_grad is
    """Context manager that freezes a model and, on exit or exception, puts everything back exactly.

    Inside, every module is in eval mode, every parameter has requires_grad False and .grad None, and the model works
    on copies of its buffers. On exit every module has its own training flag again, every parameter its requires_grad
    and its very .grad, every buffer name its very tensor, which was never written to, and the global random state (CPU
    and, once initialised, CUDA) is what it was. The flags are set directly, so an overridden `train` or `eval` does not
    run. May be nested and reused. Lazy parameters and buffers that are initialised inside stay initialised. Threads
    attack the same model one after the other; models that share modules are not known to be one.

    A forward inside keeps for its backward only what the gradient of its input needs (`moe_kernels.attacks.lean`). From
    the second on, batch norms are folded into copies of the weights of the convolutions before them, which rounds
    otherwise (`moe_kernels.attacks.fold`).

    Args:
        model: any module; a callable that is no module has nothing to freeze.

    Example:
        with attack_mode(model):
            (grad,) = torch.autograd.grad(loss(model(x), y), [x])
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self._restore: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            if isinstance(self.model, nn.Module):
                stack.enter_context(_LOCKS.setdefault(self.model, RLock()))
            cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            if isinstance(self.model, nn.Module):
                _freeze(self.model, stack)
            mode = LeanMode()
            stack.callback(mode.folds.close)
            stack.enter_context(mode)
            self._restore.append(stack.pop_all())

    def __exit__(self, *exception: object) -> None:
        self._restore.pop().close()


def _freeze(model: nn.Module, stack: ExitStack) -> None:
    def put(restore: Callable[[str, Any], None], name: str, new: object, old: object) -> None:
        stack.callback(restore, name, old)
        restore(name, new)

    # A copy instead of saving and restoring values: batch norm writes its statistics without raising their version,
    # and writing them back would raise it under a graph of the caller's that saved them.
    copies: dict[Tensor | None, Tensor | None] = {None: None}
    copies |= {buffer: buffer.detach().clone() for buffer in model.buffers() if not is_lazy(buffer)}
    for module in model.modules():
        put(module.__setattr__, "training", False, module.training)
        buffers = module._buffers
        for name, buffer in list(buffers.items()):
            if buffer in copies:
                put(buffers.__setitem__, name, copies[buffer], buffer)
    detached: dict[Tensor, Tensor] = {}
    for module in model.modules():
        parameters = module._parameters
        for name, parameter in list(parameters.items()):
            if parameter is not None and not parameter.is_leaf:  # put there by torch.func.functional_call
                put(parameters.__setitem__, name, detached.setdefault(parameter, parameter.detach()), parameter)
    for parameter in model.parameters():
        put(parameter.__setattr__, "grad", None, parameter.grad)
        put(parameter.__setattr__, "requires_grad", False, parameter.requires_grad)
