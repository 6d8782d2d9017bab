"""A user's mistake gives one line that names the argument, what was expected and what came, or is understood."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_kernels import (
    APGD,
    PGD,
    ExpertBatchNorm2d,
    ExpertConv2d,
    ExpertLayerNorm,
    ExpertLinear,
    ExpertPreActResNet,
    ExpertResNet18,
    ExpertViT,
    RobustMoE,
    attack_mode,
    pgd_step_,
    topk_route,
)
from moe_kernels.attacks import ExpertAttack, JointAttack

X, Y = torch.rand(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.numpy(), Y, "x must be a tensor, got numpy.ndarray"),
        (X.tolist(), Y, "x must be a tensor, got list"),
        (X, Y.tolist(), r"y must be a tensor of integer class labels, here \[4\], got list"),
        (X, Y.numpy(), r"y must be a tensor of integer class labels, here \[4\], got numpy.ndarray"),
        (
            X.new_tensor([[1.0000001]]),
            Y[:1],
            r"x must lie within bounds \(0, 1\), got min 1.00000011\d+ and max 1.0000001",
        ),
    ],
)
@pytest.mark.parametrize("attack", [PGD, APGD])
def test_attacks_refuse_what_is_not_a_tensor(attack: type[PGD | APGD], x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(nn.Linear(3, 3))(x, y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.uint32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    net = nn.Linear(3, 3)
    assert torch.equal(PGD(net, seed=0)(X, Y.to(dtype)), PGD(net, seed=0)(X, Y))


@pytest.mark.parametrize(
    "bounds", [([0, 0, 0], [1, 1, 1]), (torch.zeros(3), torch.ones(3)), 1, (0, 1, 2), "01", (1, 0)]
)
def test_bounds_must_be_a_pair_of_numbers(bounds: object) -> None:
    for make in (PGD, APGD):
        with pytest.raises(ValueError, match=r"bounds must be \(low, high\) with low < high, two numbers, got"):
            make(nn.Linear(3, 3), bounds=bounds)
    with pytest.raises(ValueError, match=r"bounds must be \(low, high\) with low <= high, two numbers, got"):
        pgd_step_(X.clone(), X, X, 0.1, 0.1, bounds=bounds)


@pytest.mark.parametrize(
    ("name", "others"),
    [("Linf", ["linf", "LINF", "inf", math.inf, np.inf]), ("L2", ["l2", "2", 2, 2.0]), ("L1", ["l1", 1])],
)
def test_norms_as_other_libraries_spell_them(name: str, others: list[object]) -> None:
    net = nn.Linear(3, 3)
    for other in others:
        assert torch.equal(PGD(net, 0.1, norm=other, seed=0)(X, Y), PGD(net, 0.1, norm=name, seed=0)(X, Y))
        if name != "L1":
            found, expected = (APGD(net, 0.1, norm=n, steps=3, seed=0)(X, Y) for n in (other, name))
            assert torch.equal(found, expected)
        steps = [pgd_step_(X.clone(), X - 0.5, X, 0.1, 0.1, norm) for norm in (other, name)]
        assert torch.equal(*steps)


@pytest.mark.parametrize("norm", ["L3", 3, True, None, ["Linf"], np.array([1, 2]), torch.tensor([1, 2])])
def test_unknown_norms(norm: object) -> None:
    for make in (PGD, APGD):
        with pytest.raises(ValueError, match="norm must be 'Linf'"):
            make(nn.Linear(3, 3), norm=norm)


def test_arguments_after_eps_are_keyword_only() -> None:
    for attack in (APGD, ExpertAttack, JointAttack):
        with pytest.raises(TypeError, match="positional arguments"):
            attack(RobustMoE(3, 4, 2), 0.1, 10)


def test_a_step_size_in_pixels_of_255_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"alpha=2 spans bounds \(0, 1\) and the ball of eps=0.03.*; write 2/255, not 2"
    ):
        PGD(nn.Linear(3, 3), alpha=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(nn.Linear(3, 3), eps=8, alpha=2, bounds=(0, 255))
        PGD(nn.Linear(3, 3), eps=1, alpha=1.25)
        PGD(nn.Linear(3, 3), eps=0.1, alpha=0.5)
        PGD(nn.Linear(3, 3), eps=0.5, alpha=2, norm="L2")


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_probabilities_instead_of_logits_are_warned_of(attack: type[PGD | APGD]) -> None:
    net = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="model returned probabilities where logits are expected"):
        attack(nn.Sequential(net, nn.Softmax(1)))(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(net)(X, Y)
        attack(nn.Sequential(net, nn.LogSoftmax(1)))(X, Y)
        attack(lambda x: net(x)[:, :1].abs() * 0 + 1 + 0 * x.sum(1, keepdim=True))(X, 0 * Y)
        attack(nn.Sequential(net, nn.Softmax(1)), loss=lambda p, y: -p.gather(1, y[:, None])[:, 0])(X, Y)


def test_a_module_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(3, 3))
    message = "model must be made outside torch.inference_mode, got 0.weight made inside"
    for run in (lambda: PGD(net)(X, Y), attack_mode(net).__enter__):
        with pytest.raises(ValueError, match=message):
            run()
        assert net.training and all(p.requires_grad for p in net.parameters())


def test_a_layer_refuses_wrong_dtypes_and_routings() -> None:
    moe = RobustMoE(3, 4, 2, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"x must have the dtype of the router's weight, torch.bfloat16, got torch.float32"
    ):
        moe(X)
    for layer in (moe, RobustMoE(3, 4, 2, router=nn.Sequential(nn.Linear(3, 2)))):
        with pytest.raises(ValueError, match=r"x must be a floating-point tensor, got torch.int64"):
            layer(torch.ones(4, 3, dtype=torch.int64))
    moe = RobustMoE(3, 4, 2)
    for routing in (Y, [0, 1, 1, 0], moe.route):
        with pytest.raises(
            ValueError, match=r"routing must be a Routing, as route\(x\) returns, or its select or fixed"
        ):
            moe(X, routing=routing)


@pytest.mark.parametrize("x", [X.numpy(), X.tolist(), None])
def test_a_layer_refuses_what_is_not_a_tensor(x: object) -> None:
    moe = RobustMoE(3, 4, 2)
    for run in (moe, moe.route, lambda x: moe(x, routing=moe.route(X))):
        with pytest.raises(ValueError, match=r"x must be a tensor, got (numpy.ndarray|list|NoneType)"):
            run(x)


def test_an_expert_is_no_fraction() -> None:
    routing = RobustMoE(3, 4, 2).route(X)
    with pytest.raises(ValueError, match=r"e must be an expert between 0 and E - 1 = 1, got 0\.5"):
        routing.fixed(0.5)
    with pytest.raises(ValueError, match=r"i must be a rank between 0 and k - 1 = 1, got 0\.5"):
        routing.select(0.5)


def test_a_layer_refuses_a_scalar() -> None:
    with pytest.raises(ValueError, match=r"x must have 3 features, got shape \[\]"):
        RobustMoE(3, 4, 2)(torch.tensor(1.0))


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_an_attack_refuses_a_bad_eps_or_model(attack: type[PGD | APGD]) -> None:
    net = nn.Linear(3, 3)
    for eps in ([0.1] * 4, np.full(4, 0.1), np.array(["a"])):
        with pytest.raises(ValueError, match="eps must be finite and >= 0: a number"):
            attack(net, eps)
    for model in (None, "net", [net], 3):
        for make in (attack, attack_mode):
            with pytest.raises(ValueError, match="model must be a module or a function from x to logits, got"):
                make(model)


def test_a_mixture_refuses_bad_experts_or_routers() -> None:
    router = nn.Linear(3, 2)
    assert RobustMoE.from_experts((nn.Linear(3, 3) for _ in range(2)), router).num_experts == 2
    for experts in (None, 2):
        with pytest.raises(ValueError, match="experts must be a list of modules or a grouped network with the attri"):
            RobustMoE.from_experts(experts, router)
    for other in (None, lambda x: x):
        with pytest.raises(ValueError, match=r"router must be a module that maps x to logits \[..., E\], got"):
            RobustMoE.from_experts([nn.Linear(3, 3)] * 2, other)
    with pytest.raises(ValueError, match=r"top_k must be between 1 and num_experts = 2, got 1\.5"):
        RobustMoE.from_experts([nn.Linear(3, 3)] * 2, router, top_k=1.5)
    with pytest.raises(ValueError, match="experts must be at least one module, got none"):
        RobustMoE.from_experts([], router)
    with pytest.raises(ValueError, match=r"experts\[1\] must be a module, got builtin_function_or_method"):
        RobustMoE.from_experts([nn.Linear(3, 3), torch.relu], router)

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    for experts, message in [
        (
            [nn.Linear(3, 5), nn.Linear(3, 6)],
            r"experts must return rows of one shape, got \[5\] of experts\[0\], \[6\] of",
        ),
        (
            [nn.Linear(3, 5), Pair(3, 5)],
            r"experts\[1\] must return a tensor with a row for each of its \d rows, got tuple",
        ),
        (
            [nn.Linear(3, 5), nn.Flatten(0)],
            r"experts\[1\] must return a tensor with a row for each of its \d rows, got \[",
        ),
    ]:
        moe = RobustMoE.from_experts(experts, router, top_k=2)
        with pytest.raises(ValueError, match=message):
            moe(X)


def test_a_number_of_experts_that_there_is_not() -> None:
    moe, logits = RobustMoE(3, 4, 2), torch.rand(4, 2)
    for k in (0, 3, 1.5):
        with pytest.raises(ValueError, match=f"top_k must be between 1 and num_experts = 2, got {k}"):
            moe.route(X, top_k=k)
        with pytest.raises(ValueError, match=f"k must be between 1 and the number of experts E = 2, got {k}"):
            topk_route(logits, k)


def test_a_router_that_does_not_flatten() -> None:
    images, experts = torch.rand(4, 3, 8, 8), [nn.Sequential(nn.Flatten(), nn.Linear(192, 5)) for _ in range(2)]
    moe = RobustMoE.from_experts(experts, nn.Linear(192, 2))
    for run in (moe, moe.route):
        with pytest.raises(
            ValueError, match=r"router must map x \[4, 3, 8, 8\] to logits \[..., 2\].* is an nn.Flatten missing in fr"
        ):
            run(images)
    moe.router = nn.Sequential(nn.Flatten(), moe.router)
    assert moe(images).shape == (4, 5)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (ExpertLinear, (0, 3, 4), "num_experts must be an integer >= 1, got 0"),
        (ExpertLinear, (2, -3, 4), "in_features must be an integer >= 0, got -3"),
        (ExpertConv2d, (0, 3, 4, 3), "num_experts must be an integer >= 1, got 0"),
        (ExpertConv2d, (2, 0, 4, 3), "in_channels must be an integer >= 1, got 0"),
        (ExpertConv2d, (2, 3, 0, 3), "out_channels must be an integer >= 1, got 0"),
        (ExpertConv2d, (2, 3, 4, 0), "kernel_size must be one or two integers >= 1, got 0"),
        (ExpertConv2d, (2, 3, 4, 3, 0), "stride must be one or two integers >= 1, got 0"),
        (ExpertConv2d, (2, 3, 4, 3, 1, (0, -1)), r"padding must be one or two integers >= 0, got \(0, -1\)"),
        (ExpertBatchNorm2d, (0, 3), "num_experts must be an integer >= 1, got 0"),
        (ExpertLayerNorm, (0, 3), "num_experts must be an integer >= 1, got 0"),
        (ExpertResNet18, (0,), "num_experts must be an integer >= 1, got 0"),
        (ExpertResNet18, (2, 0), "num_classes must be an integer >= 1, got 0"),
        (ExpertResNet18, (2, 10, 0), "in_channels must be an integer >= 1, got 0"),
        (ExpertResNet18, (2, 10, 3, 0), "width must be an integer >= 1, got 0"),
        (ExpertResNet18, (2, 10, 3, 1.5), "width must be an integer >= 1, got 1.5"),
        (ExpertPreActResNet, (2, 10, 3, [(4, 0)], 4), "blocks of stages must be an integer >= 1, got 0"),
        (ExpertPreActResNet.resnet18, (0,), "num_experts must be an integer >= 1, got 0"),
        (ExpertPreActResNet.resnet18, (2, 10, 3, 0), "width must be an integer >= 1, got 0"),
        (ExpertPreActResNet.wide, (2, 10, 3, 10, 0), "width must be an integer >= 1, got 0"),
        (ExpertViT, (0, 10, 3, 8, 4, 8, 1, 2), "num_experts must be an integer >= 1, got 0"),
        (ExpertViT, (2, 10, 3, 8, 0, 8, 1, 2), "patch must be an integer >= 1, got 0"),
        (ExpertViT, (2, 10, 3, 8, 4, 0, 1, 2), "width must be an integer >= 1, got 0"),
        (ExpertViT, (2, 10, 3, 8, 4, 8, 1, 0), "heads must be an integer >= 1, got 0"),
    ],
)
def test_sizes_of_layers_and_networks(
    make: Callable[..., nn.Module], arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(*arguments)


def test_a_routing_shows_its_shapes() -> None:
    routing = RobustMoE(3, 4, 5).route(X)
    assert repr(routing) == "Routing(logits=[4, 5], weights=[4, 2], experts=[4, 2], torch.float32 on cpu)"
