"""The losses that PGD ascends, its targets, and its counts of zero and NaN gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from attacked import WIDE, images, network, start
from torch import Tensor, nn

from moe_kernels.attacks import PGD


def test_a_success_outranks_any_loss() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([1 - x, x], 1)  # class 1 above 0.5

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return -logits[:, 1]  # leads away from success

    x, y = torch.tensor([[0.6]]), torch.tensor([0])
    attack = PGD(model, 0.3, 0.1, 5, loss=loss, random_start=False)
    torch.testing.assert_close(attack(x, y), x)
    attack.best_iterate = False
    torch.testing.assert_close(attack(x, y), x - 0.3)


def test_a_nan_loss_is_beaten_by_any_number() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return logits[:, 1] + torch.where(logits[:, 1] < 0.65, math.nan, 0)

    x, y = torch.tensor([[0.4, 0.6]]), torch.tensor([0])
    x_adv = PGD(lambda x: x, 0.1, 0.1, steps=1, loss=loss, random_start=False)(x, y)
    torch.testing.assert_close(x_adv, torch.tensor([[0.4, 0.7]]))


def test_losses_are_summed() -> None:
    """The gradient of a sample does not shrink with the batch, so that it does not underflow in 16 bits."""
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(seen.append)
        return x

    x, y = torch.rand(1, 4).expand(100, 4), torch.zeros(100, dtype=torch.int64)
    PGD(model, steps=1, random_start=False)(x, y)
    torch.testing.assert_close(seen[0], x.softmax(1) - F.one_hot(y, 4))


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_targets_are_reached(loss: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    x, _ = images()
    targets = (model(x).argmax(1) + 1) % 4
    x_adv = PGD(model, eps=0.5, alpha=0.1, steps=20, loss=loss, targeted=True)(x, targets)
    assert torch.equal(model(x_adv).argmax(1), targets)


def test_a_reached_target_is_kept() -> None:
    x, targets = torch.tensor([[0.9, 0.1]]), torch.tensor([0])

    def away(logits: Tensor, y: Tensor) -> Tensor:
        return logits[:, 0]  # descended: away from the target

    x_adv = PGD(lambda x: x, 0.9, 0.3, 4, loss=away, targeted=True, random_start=False)(x, targets)
    assert x_adv.argmax(1) == 0


def test_gradients_with_nan_are_counted() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([x, torch.where(x > 0.5, (x - 0.5).sqrt(), 0)], 1)  # below 0.5 the gradient is 0 * NaN

    x, y = torch.tensor([[0.2], [0.9], [0.3]]), torch.zeros(3, dtype=torch.int64)
    attack = PGD(model, 0.05, 0.01, steps=4, random_start=False)
    with pytest.warns(RuntimeWarning, match="8 of 12 gradients held a NaN"):
        x_adv = attack(x, y)
    assert attack.nan_gradients == 8 and attack.zero_gradients == 0
    torch.testing.assert_close(x_adv - x, torch.tensor([[0.0], [-0.04], [0.0]]))


def test_zero_gradients_are_counted() -> None:
    def model(x: Tensor) -> Tensor:
        return F.pad(x.relu(), (0, 1))

    x, y = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-2.0, -3.0]]), torch.zeros(3, dtype=torch.int64)
    attack = PGD(model, 0.1, 0.01, steps=5, restarts=2, bounds=WIDE)
    attack(x, y)
    assert attack.zero_gradients == 20 and attack.nan_gradients == 0
    attack(x[1:2], y[:1])
    assert attack.zero_gradients == 0


@pytest.mark.parametrize("random_start", [True, False])
def test_kl_moves_the_prediction(random_start: bool) -> None:
    model, (x, y) = network().eval(), images()
    attack = PGD(model, eps=0.1, alpha=0.03, loss="kl", random_start=random_start, seed=0)
    x_adv = attack(x, y)

    def divergence(other: Tensor) -> Tensor:
        clean, changed = (model(v).log_softmax(1) for v in (x, other))
        return F.kl_div(changed, clean, reduction="none", log_target=True).sum(1)

    attack.steps = 0
    assert (x_adv - x).abs().max() == pytest.approx(0.1, rel=1e-3)
    assert (divergence(x_adv) > 2 * divergence(attack(x, y))).all()
    assert attack.zero_gradients == 0


def test_kl_is_measured_from_the_clean_prediction() -> None:
    model, (x, y) = network().double().eval(), images(dtype=torch.float64)
    clean = model(x).log_softmax(1).detach()

    def divergence(logits: Tensor, y: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)

    torch.testing.assert_close(PGD(model, loss="kl", seed=0)(x, y), PGD(model, loss=divergence, seed=0)(x, y))


def test_kl_without_a_random_start_begins_near_x() -> None:
    x = torch.full((20, 500), 0.5)
    offset = start(x, loss="kl", random_start=False, eps=0.1) - x
    assert offset.std() == pytest.approx(0.001, rel=0.05) and abs(offset.mean()) < 1e-4
    assert (start(x, loss="kl", random_start=False, eps=0.0005) - x).abs().max() == pytest.approx(0.0005, rel=1e-3)


def test_kl_is_safe_when_a_probability_underflows() -> None:
    attack = PGD(lambda x: 1e4 * x, 0.1, 0.03, loss="kl")
    x, y = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.21, 0.22]]), torch.tensor([2, 2])
    assert attack(x, y).isfinite().all()
    assert attack.nan_gradients == 0


def test_a_callable_loss() -> None:
    x, y = images()
    model = network()
    ours = PGD(model, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"), seed=0)
    assert torch.equal(ours(x, y), PGD(model, seed=0)(x, y))


def test_margin_is_the_distance_to_the_strongest_other_class() -> None:
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1])
    by_hand = PGD(lambda x: x, 0.1, 0.1, 1, loss="margin", random_start=False, bounds=WIDE)(logits, y)
    torch.testing.assert_close(by_hand - logits, torch.tensor([[-0.1, 0.0, 0.1], [0.1, -0.1, 0.0]]))
