"""Initial weights from files of other code, read without running anything in them.

Either a mixture as the public RT-ER code saves it, `experts.<i>.net.*` or `experts.<i>.vit.*` and `router.gate.*`, or
two of these under `Smoe.` and `Rmoe.`, as in its dual model; or one network that initialises every expert: a ResNet-18
of pytorch-cifar or torchvision, or a vision transformer of timm. DataParallel's prefix `module.` is dropped, and a head
for another number of classes is not loaded.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moe_kernels import RobustMoE
from moe_kernels.nn import GroupedNetwork
from rter.checkpoint import refusal
from rter.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which checkpoints keep a state dict
HEADS = ("head.", "linear.", "fc.")


def load_initial(model: nn.Module, path: Path) -> None:
    """Loads the file into every mixture of the model; a dual file's F_S goes into F_S, its F_R into F_R.

    Raises:
        UserError: if the file cannot be read, holds more than tensors, or does not fit.
    """
    state = read_state(path)
    for name, moe in model.named_modules():
        if isinstance(moe, RobustMoE):
            prefix = "Smoe." if name.startswith("standard.") else "Rmoe."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            try:
                _load(moe, own or state)
            except ValueError as error:
                raise UserError(f"{path} does not fit the model: {error}") from None


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in one of torch.save, without the prefix of DataParallel."""
    state: Any
    try:
        if path.suffix.lower() == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} must be a file of tensors and nothing else: {refusal(error)}") from None
    while isinstance(state, Mapping) and (wrapper := next((w for w in WRAPPERS if w in state), None)):
        state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} must hold a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(moe: RobustMoE, state: Mapping[str, Tensor]) -> None:
    net = moe.experts
    assert isinstance(net, GroupedNetwork)
    experts: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"experts\.(\d+)\.(?:(?:module|net|vit)\.)*(.*)", key):
            experts.setdefault(int(match[1]), {})[match[2]] = value
    if not experts:
        net.load_state_dicts([_with_own_head(state, own) for own in net.state_dicts()])
        return
    if sorted(experts) != list(range(net.num_experts)):
        raise ValueError(f"it holds the experts {sorted(experts)}, the model has {net.num_experts}")
    gate = {re.sub(r"^router\.gate\.", "1.", k): v for k, v in state.items() if k.startswith("router.")}
    own = moe.router.state_dict()
    if {key: value.shape for key, value in gate.items()} != {key: value.shape for key, value in own.items()}:
        shapes = {key: list(value.shape) for key, value in gate.items()}
        raise ValueError(f"router must be { ({key: list(value.shape) for key, value in own.items()}) }, got {shapes}")
    net.load_state_dicts([experts[e] for e in sorted(experts)])
    moe.router.load_state_dict(gate)


def _with_own_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of one network, with the model's own head if the file's has other shapes."""
    kept = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    given = {re.sub(r"^fc\.", "linear.", k): v for k, v in state.items() if k.startswith(HEADS)}
    fits = all(key in own and own[key].shape == value.shape for key, value in given.items())
    return kept | (given if fits and given else {k: v for k, v in own.items() if k.startswith(HEADS)})
