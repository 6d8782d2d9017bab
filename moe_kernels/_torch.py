"""Every private name of torch that this package uses, and what it asks about torch's state: a new torch that renames
or drops one of them breaks this file alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["TorchDispatchMode", "tree_flatten", "tree_leaves", "tree_unflatten"]

aten = torch.ops.aten

# Operators
AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd
adaptive_avg_pool2d_backward = aten._adaptive_avg_pool2d_backward
adaptive_avg_pool3d_backward = aten._adaptive_avg_pool3d_backward
local_scalar_dense = aten._local_scalar_dense
unique_operators = {aten._unique, aten._unique2}
unsafe_view = aten._unsafe_view.default
cpu_multiplies_bf16: Callable[[], bool] = torch.cpu._is_avx512_bf16_supported


def has_kernel(operator: str, device: str) -> bool:
    """Whether a library that is loaded implements the operator "namespace::name" for "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """Sends sent[p] rows of x to each process p of a group and receives received[p]; torch.compile can trace it."""
    from torch.distributed import _functional_collectives as collectives  # takes a second to import

    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), received, sent, group))


def compiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model under torch.compile; a call of it raises RuntimeError, in one line, if torch.compile fails, as it does
    without a C++ compiler."""
    run = torch.compile(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return run(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"compile must be False for this model, since torch.compile fails: {reason}") from error

    return forward


def release_graph_pool(pool: Any) -> None:
    """Ends a failed recording of a CUDA graph into its memory pool."""
    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


# Tensors and storages
version: Callable[[Tensor], int] = attrgetter("_version")  # rises with each write to the tensor or a view of it


def is_view(x: Tensor) -> bool:
    return x._is_view()


def storage_key(x: Tensor) -> int:
    """A number that all tensors sharing x's memory have in common, until it is freed."""
    return x.untyped_storage()._cdata


def storage_of(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage that is referred to, if it is alive."""
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


# Modules: the dictionaries of a module's own tensors by name; writing to them bypasses nn.Module.__setattr__.
parameters_of: Callable[[nn.Module], dict[str, Any]] = attrgetter("_parameters")
buffers_of: Callable[[nn.Module], dict[str, Any]] = attrgetter("_buffers")


def state_of(module: nn.Module, parameters: bool) -> dict[str, Any]:
    """The module's mode, buffers and, if wanted, parameters, as entries of vars(module)."""
    own = {"_parameters": dict(module._parameters)} if parameters else {}
    return {"training": module.training, "_buffers": dict(module._buffers), **own}


def active_ddp() -> DistributedDataParallel | None:
    """The DDP module whose forward is running."""
    return DistributedDataParallel._active_ddp_module


def ddp_ignores(model: nn.Module, names: list[str]) -> None:
    """Makes a DDP module that is later built around the model ignore the parameters and buffers of these names."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@contextmanager
def without_ddp(ddp: DistributedDataParallel) -> Iterator[None]:
    """Switches DDP's communication off: in forwards, of which processes may make unequal numbers, and in backwards,
    which a static graph would mistake for training steps. Buffers are synchronised with rank 0 once, on entry."""
    if ddp._check_sync_bufs_pre_fwd():
        ddp._sync_buffers()
    flags = {
        "require_backward_grad_sync": False,
        "require_forward_param_sync": False,
        "_static_graph_delay_allreduce_enqueued": True,
    }
    before = {name: vars(ddp)[name] for name in flags if name in vars(ddp)}
    vars(ddp).update({name: flags[name] for name in before})
    try:
        yield
    finally:
        vars(ddp).update(before)


# Autograd
func_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
saved_tensor_hooks_are_allowed: Callable[[], bool] = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost pair (pack, unpack) that is active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def inside_checkpoint() -> bool:
    """Whether this runs in torch.utils.checkpoint, which keeps none of its tensors and runs it a second time."""
    hooks = saved_tensor_hooks()
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def inside_backward() -> bool:
    """Whether this runs in a backward, as a forward does that a checkpoint repeats; False under torch.compile."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def inside_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def inside_transform() -> bool:
    """Whether torch.func or forward mode is differentiating what runs now, so that every step must be torch's own."""
    if inside_forward_mode():
        return True
    if not func_is_active():
        return False
    functorch = torch._C._functorch
    kinds = [level.key() for level in functorch.get_interpreter_stack() or ()]
    return functorch.TransformType.Grad in kinds or functorch.TransformType.Jvp in kinds


def is_mapped(x: Tensor) -> bool:
    """Whether torch.func.vmap maps over x while gradients are taken, as in vmap(grad(...))."""
    functorch = torch._C._functorch
    while inside_transform() and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def vjp(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    grads: tuple[Tensor | None, ...],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Differentiable vector-Jacobian product of a plain-torch function: the double backward of ops that need it.

    `needed[i]` says whether inputs[i] needs a gradient; the result has one entry per input, None where it does not.
    """
    with torch.enable_grad():
        leaves = [x.view_as(x) if want else x for x, want in zip(inputs, needed, strict=True)]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        wanted = [x for x, want in zip(leaves, needed, strict=True) if want]
        result = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(result) if want else None for want in needed)


# Autocast
def autocast_is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises on meta


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast casts x: its own if it is on for x's device and x is not float64, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype != torch.float64 and autocast_is_on(device) else x.dtype


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast casts them; None stays None."""
    first = tensors[0]
    assert first is not None
    if not autocast_is_on(first.device.type):
        return tensors  # type: ignore[return-value]
    return tuple(t if t is None else t.to(autocast_dtype(t)) for t in tensors)  # type: ignore[misc]


def capture_autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes contexts in which autocast is as it was when capture_autocast was called."""
    enabled, dtype = captured = _autocast_state(device)

    def context() -> AbstractContextManager[Any]:
        same = _autocast_state(device) == captured
        return nullcontext() if same else torch.autocast(device, dtype, enabled, cache_enabled=False)

    return context


def _autocast_state(device: str) -> tuple[bool, torch.dtype | None]:
    enabled = autocast_is_on(device)
    return enabled, torch.get_autocast_dtype(device) if enabled else None
