"""What all grouped networks share: their state is that of one plain network per expert."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class GroupedNetwork(nn.Module):
    """A network per expert, called with rows sorted by expert and their offsets.

    Every tensor of its state is the plain network's with a leading expert dimension [E].
    """

    num_experts: int

    @staticmethod
    def plain_name(key: str) -> str:
        """The name here of a tensor that other code may name otherwise."""
        return key

    def load_state_dicts(self, experts: Sequence[Mapping[str, Tensor]]) -> None:
        """Loads one plain state dict per expert.

        Raises:
            ValueError: if their number is another, or keys are missing, unexpected or of another shape.
        """
        if len(experts) != self.num_experts:
            raise ValueError(f"experts must be {self.num_experts} state dicts, got {len(experts)}")
        named = [{self.plain_name(key): value for key, value in state.items()} for state in experts]
        expected = {key: value[0].shape for key, value in self.state_dict().items()}
        for i, state in enumerate(named):
            self._check(f"experts[{i}]", state, expected)
        self.load_state_dict({key: torch.stack([state[key] for state in named]) for key in expected})

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """One plain state dict per expert, sharing this network's memory."""
        state = self.state_dict()
        return [{key: value[e] for key, value in state.items()} for e in range(self.num_experts)]

    def _check(self, name: str, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
        shapes = {
            f"{key} {list(state[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        }
        missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
        faults = {"missing": missing, "unexpected": unexpected, "shapes": shapes}
        message = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, keys in faults.items() if keys)
        if message:
            raise ValueError(f"{name} must be a state dict for one expert of {type(self).__name__}; {message}")
