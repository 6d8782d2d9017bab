"""Layers: parameters and calls of the operators, no kernels."""

from moe_kernels.nn.routing import Routing

__all__ = ["Routing"]
