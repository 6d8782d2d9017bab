"""Saving to and loading from a folder or the Hugging Face hub, where huggingface_hub is installed."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class HubMixin:
        """Stands in for huggingface_hub's mixin, without `save_pretrained`, `from_pretrained` and `push_to_hub`."""

else:

    class HubMixin(PyTorchModelHubMixin):  # type: ignore[no-redef]
        """huggingface_hub's mixin for a layer whose arguments are plain values: config.json and model.safetensors."""

        def __init_subclass__(cls, **kwargs: Any) -> None:
            dtypes = {torch.dtype: (lambda dtype: str(dtype).removeprefix("torch."), lambda name: getattr(torch, name))}
            super().__init_subclass__(coders=dtypes, library_name="moe_kernels", **kwargs)

        def _save_pretrained(self, save_directory: Path) -> None:
            problem = self.unsaveable()
            if problem:
                raise ValueError(f"save_pretrained needs a layer made from plain arguments, got one with {problem}")
            assert isinstance(self._hub_mixin_config, dict)
            self._hub_mixin_config.pop("device", None)  # whoever loads it chooses
            super()._save_pretrained(save_directory)

        @abstractmethod
        def unsaveable(self) -> str | None:
            """What keeps this layer from being made again from its arguments, or None."""
