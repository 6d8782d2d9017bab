"""Forward-mode differentiation and torch.func: tangents and gradients are those of the ordinary backward, never 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from moe_kernels import ExpertPreActResNet, ExpertResNet18, ExpertViT, RobustMoE, attack_mode, pgd_step_, testing

EVERY = [c for c in testing.CASES if c.has_gradient and testing.differentiable(c.arguments(c.dtypes[0]))]
# The first case with rows of each operator, and all those whose gradient is by definition not the derivative.
CASES = list({c.op: c for c in reversed(EVERY) if "no_rows" not in c.name}.values())
CASES += [c for c in EVERY if not c.gradcheck]


def dual(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, at, along))).tangent


def check_derivatives(function: Callable[..., Tensor], *at: Tensor) -> None:
    """<u, J v> of every forward mode equals <J^T u, v> of the ordinary backward, and torch.func's J^T u is the same."""
    leaves = tuple(x.detach().requires_grad_() for x in at)
    y = function(*leaves)
    u, along = torch.randn_like(y), tuple(torch.randn_like(x) for x in at)
    backward = torch.autograd.grad(y, leaves, u)
    expected = sum((g * v).sum() for g, v in zip(backward, along, strict=True))
    assert expected != 0
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if y.dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    for tangent in (torch.func.jvp(function, at, along)[1], dual(function, at, along)):
        assert tangent is not None
        torch.testing.assert_close((u * tangent).sum(), expected, **tolerance)
    for found, wanted in zip(torch.func.vjp(function, *at)[1](u), backward, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)
    torch.testing.assert_close(torch.func.grad(lambda *x: (u * function(*x)).sum())(*at), backward[0], **tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(case: testing.Case) -> None:
    args = case.arguments(torch.float64 if torch.float64 in case.dtypes else torch.float32)
    training = case.op == "expert_batch_norm"
    if training:  # torch.func refuses writes to running statistics, torch's own included
        args = (*args[:3], None, None, args[5], True)
    wanted = testing.differentiable(args, case.buffers)

    def function(*leaves: Tensor) -> Tensor:
        full = list(args)
        for i, leaf in zip(wanted, leaves, strict=True):
            full[i] = leaf
        outputs = testing.as_tuple(testing.operator(case)(*full))
        return torch.cat([y.flatten() for y in outputs if y.is_floating_point()])

    check_derivatives(function, *(args[i] for i in wanted))


def images(experts: Any) -> nn.Module:
    router = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, dtype=torch.float64))
    return RobustMoE.from_experts(experts, router, top_k=2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: RobustMoE(8, 6, 3, activation="geglu", dtype=torch.float64),
    "mlp, none recomputed": lambda: RobustMoE(8, 6, 3, dtype=torch.float64, recompute="none"),
    "mlp, all recomputed": lambda: RobustMoE(8, 6, 3, dtype=torch.float64, recompute="all"),
    "relu": lambda: RobustMoE(8, 6, 3, activation="relu", dtype=torch.float64),
    "resnet": lambda: images(ExpertResNet18(2, 5, width=2, dtype=torch.float64)),
    "resnet, all recomputed": lambda: images(ExpertResNet18(2, 5, width=2, dtype=torch.float64, recompute="all")),
    "preact": lambda: images(ExpertPreActResNet.resnet18(2, 5, width=2, dtype=torch.float64)),
    "vit": lambda: images(ExpertViT(2, 5, image_size=8, patch=4, width=8, depth=1, heads=2, dtype=torch.float64)),
    "list": lambda: images([nn.Sequential(nn.Flatten(), nn.Linear(192, 5, dtype=torch.float64)) for _ in range(2)]),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attacked", [False, True])
def test_networks(name: str, attacked: bool) -> None:
    net = NETWORKS[name]().eval()
    x = torch.randn(*((7, 8) if isinstance(net.dim, int) else (4, 3, 8, 8)), dtype=torch.float64)
    if not attacked:
        check_derivatives(net, x)
    else:
        with attack_mode(net):
            check_derivatives(net, x)


def test_jacobians() -> None:
    moe = RobustMoE(3, 4, 2, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(moe, x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(moe)(x), expected)


def test_per_sample_gradients_are_refused_by_a_clear_message() -> None:
    moe = RobustMoE(3, 4, 2)
    message = "experts must be one tensor for all rows, got one for each sample of torch.func.vmap"
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(torch.func.grad(lambda x: moe(x[None]).sum()))(torch.randn(5, 3))


def test_a_step_of_pgd_has_no_tangent() -> None:
    x, v = torch.rand(2, 3), torch.ones(2, 3)

    def step(x: Tensor) -> Tensor:
        return pgd_step_(x.clone(), torch.ones_like(x), x, 0.1, 0.1)

    for transform in (torch.func.jvp, dual):
        with pytest.raises(RuntimeError, match="pgd_step_ has no derivative"):
            transform(step, (x,), (v,))
