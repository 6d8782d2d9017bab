"""PGD refuses what it cannot attack, naming the argument, and warns of likely mistakes."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.attacks import APGD, PGD
from moe_kernels.attacks.attack_mode import mode_of

NETWORK = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L3"}, "norm must be"),
        ({"loss": "mse"}, "loss must be"),
        ({"loss": "kl", "targeted": True}, "targeted must be"),
        ({"eps": -0.1}, "eps must be"),
        ({"eps": "8/x"}, "eps must be"),
        ({"eps": "1/0"}, "eps must be"),
        ({"eps": math.nan}, "eps must be"),
        ({"eps": None}, "eps must be"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps must be"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"steps": -1}, "steps must be"),
        ({"steps": 1.5}, "steps must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"restarts": 0}, "restarts must be"),
        ({"restarts": 2, "random_start": False}, "restarts must be"),
        ({"bounds": (1, 0)}, "bounds must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        PGD(NETWORK, **options)


X = torch.full((2, 3), 0.5)
Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (X.int(), Y, {}, "x must be float32 or float64, got torch.int32"),
        (X.bfloat16(), Y, {}, "x must be float32 or float64, got torch.bfloat16"),
        (X[0, 0], Y, {}, "x must be .*scalar"),
        (X - 1, Y, {}, r"x must lie within bounds \(0, 1\), got min -0.5 and max -0.5"),
        (X + 1, Y, {}, "x must lie within bounds .* max 1.5"),
        (torch.where(X == X, math.nan, X), Y, {}, "x must hold no NaN"),
        (X, Y.float(), {}, "y must be integer"),
        (X, Y.bool(), {}, "y must be integer"),
        (X, Y[:1], {}, r"y must be .* \[2\], got torch.int64 \[1\]"),
        (X, Y - 1, {}, "y must be class labels >= 0, got -1"),
        (X, Y + 2, {}, "y must be less than the 3 classes of the logits, got 3"),
        (X, Y, {"eps": torch.ones(3)}, r"eps must be .*\[2\], got shape \[3\]"),
        (X, Y, {"alpha": torch.tensor(0.1)}, r"alpha must be .*\[2\], got shape \[\]"),
        (X, Y, {"model": lambda x: x[0]}, r"model must return logits \[B, C\] with B = 2, got \[3\]"),
        (X, Y, {"model": lambda x: (x, x)}, "model must return logits .* got tuple"),
        (X, Y, {"model": lambda x: x.long()}, "logits must be a floating"),
        (X, Y, {"model": lambda x: x.detach()}, "model must return logits that depend on x"),
        (X, Y, {"model": lambda x: torch.zeros(2, 3, requires_grad=True)}, "model must return logits that depend on x"),
        (X, Y, {"loss": F.cross_entropy}, r"loss must return one value per sample, \[2\], got \[\]"),
    ],
)
def test_bad_input(x: Tensor, y: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        PGD(**{"model": lambda x: x, **options})(x, y)


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_eps_and_alpha_may_be_numpy_numbers_or_require_grad(attack: type[PGD | APGD]) -> None:
    eps = torch.full((2,), 0.1)
    expected = attack(NETWORK, eps, steps=3, seed=4)(X, Y)
    numbers: dict[str, Any] = {"steps": np.int64(3), "seed": np.int64(4)}
    assert torch.equal(attack(NETWORK, eps.clone().requires_grad_(), **numbers)(X, Y), expected)


class Slots:
    """A callable that takes neither a weak reference nor a hash."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_any_callable_is_a_model(attack: type[PGD | APGD]) -> None:
    expected = attack(lambda x: x.flatten(1), eps=0.1, steps=2, seed=0)(X, Y)
    assert torch.equal(attack(Slots(), eps=0.1, steps=2, seed=0)(X, Y), expected)


@pytest.mark.parametrize(("eps", "message"), [(8, "8/255"), (0.031, "0.03137")])
def test_likely_mistakes_are_warned_of(eps: float, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        PGD(NETWORK, eps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(NETWORK, eps, norm="L2")
        PGD(NETWORK, 8, bounds=(0, 255))


def test_a_network_without_work_for_any_rule_is_attacked_without_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on, for inputs that are no larger, while autocast is what it was."""
    entered: list[Any] = []

    def counted(*args: Any) -> Any:
        entered.append(mode_of(*args))
        return entered[-1]

    monkeypatch.setattr("moe_kernels.attacks.attack.mode_of", counted)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2**14, 2))
    attack, x, y = PGD(model, steps=2), torch.rand(16, 1, 128, 128), torch.zeros(16, dtype=torch.int64)
    attack(x, y)
    attack(x, y)
    assert len(entered) == 1
    attack(torch.cat([x, x]), torch.cat([y, y]))
    assert len(entered) == 2
    for _ in range(2):  # autocast gives the linear map a rule, which must not be lost
        with torch.autocast("cpu", torch.bfloat16):
            attack(x, y)
    assert len(entered) == 4 and [mode.applied for mode in entered] == [False, False, True, True]
