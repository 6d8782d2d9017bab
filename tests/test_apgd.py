"""APGD reaches the closed form on linear models, is as strong as its authors' code, and keeps PGD's promises."""

import math
from typing import Any

import pytest
import torch
from rter.data.split import Split
from rter.models.classifier import RobustClassifier
from torch import Tensor, nn

from moe_kernels import APGD, PGD
from moe_kernels.attacks import apgd, losses

WIDE = (-10.0, 10.0)


def linear(dtype: torch.dtype = torch.float64, classes: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes, dtype=dtype))
    return model, torch.rand(6, 3, 4, dtype=dtype), torch.arange(6) % classes


def survivors(model: nn.Module, x_adv: Tensor, y: Tensor) -> int:
    return int((model(x_adv).argmax(1) == y).sum())


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_optimum_of_a_linear_model(norm: str, loss: str, random_start: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(2, 12, dtype=torch.float64)
    x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    up = (weight[1 - y] - weight[y]).view_as(x)  # the gradient of the margin
    direction = up.sign() if norm == "Linf" else up / up.flatten(1).norm(dim=1).view(5, 1, 1)
    options = {"bounds": WIDE, "attack_misclassified": True}
    attack = APGD(
        lambda x: x.flatten(1) @ weight.T, 0.5, steps=40, loss=loss, norm=norm, random_start=random_start, **options
    )
    torch.testing.assert_close(attack(x, y), x + 0.5 * direction, rtol=0, atol=1e-4)


def test_an_optimum_inside_the_ball_is_approached_by_halving() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x), -50 * (x - 0.537).square()], 1)

    x, y = torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    x_adv = APGD(model, 0.3, steps=100, loss="margin", random_start=False)(x, y)
    assert abs(x_adv - 0.537).max() < 1e-3
    fixed_step = PGD(model, 0.3, 0.6, 100, loss="margin", random_start=False)(x, y)
    assert abs(fixed_step - 0.537).max() > 0.03


def test_checkpoints_are_the_papers() -> None:
    steps, widths = zip(*apgd._checkpoints(100), strict=True)
    assert steps == (22, 41, 57, 70, 80, 87, 93, 99) and widths == (22, 19, 16, 13, 10, 7, 6, 6)
    assert list(apgd._checkpoints(2)) == [(1, 1), (2, 1)] and not list(apgd._checkpoints(0))


def test_losses_by_hand() -> None:
    logits, y = torch.tensor([[5.0, 1.0, 3.0, 2.0], [5.0, 1.0, 3.0, 2.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(losses.dlr(logits, y), torch.tensor([-2 / 3, 4 / 3]))
    towards = losses.dlr_towards(torch.tensor([3, 2]))
    torch.testing.assert_close(towards(logits, y), torch.tensor([-3 / 3.5, 2 / 3.5]))
    torch.testing.assert_close(losses.dlr(7 * logits + 3, y), losses.dlr(logits, y))


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr_targeted"])
def test_as_strong_as_its_authors_code(loss: str, robust_digits: tuple[RobustClassifier, Split]) -> None:
    base = pytest.importorskip("pyautoattack.autopgd_base")
    model, images = robust_digits
    x, y, eps, steps = images.x, images.y, 0.15, 20
    options = {"n_iter": steps, "eps": eps, "norm": "Linf", "seed": 0}
    with torch.random.fork_rng():
        if loss == "dlr_targeted":
            theirs = base.APGDAttack_targeted(model, n_target_classes=3, **options).perturb(x, y)
        else:
            theirs = base.APGDAttack(model, loss=loss, **options).perturb(x, y)
    ours = APGD(model, eps, steps=steps, loss=loss, n_target_classes=3, seed=0)(x, y)
    clean, left, left_by_theirs = (survivors(model, v, y) for v in (x, ours, theirs))
    assert (ours - x).abs().max() <= eps and ours.min() >= 0 and ours.max() <= 1
    assert left < 0.7 * clean and left <= left_by_theirs + 0.04 * len(x)


def test_at_least_as_strong_as_pgd(robust_digits: tuple[RobustClassifier, Split]) -> None:
    model, images = robust_digits
    pgd = PGD(model, 0.15, 0.15 / 4, 20, seed=0)(images.x, images.y)
    found = APGD(model, 0.15, steps=20, seed=0)(images.x, images.y)
    assert survivors(model, found, images.y) <= survivors(model, pgd, images.y) + 0.02 * len(images)


def test_restarts_keep_the_best_and_leave_the_fooled_alone() -> None:
    model, x, y = linear()
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    one, three = (APGD(model, 0.02, steps=3, restarts=n, seed=1, attack_misclassified=True) for n in (1, 3))
    margin = losses.margin
    assert (margin(model(three(x, y)), y) >= margin(model(one(x, y)), y)).all()
    rows.clear()
    fooled = int((model(one(x, y)).argmax(1) != y).sum())
    rows.clear()
    three(x, y)
    assert rows[:4] == [6] * 4 and rows[4] == 6 - fooled and 0 < fooled < 6


@pytest.mark.parametrize("restarts", [1, 3])
def test_misclassified_samples_are_left_alone_without_changing_robust_accuracy(restarts: int) -> None:
    model, x, y = linear()
    misread = model(x).argmax(1) != y
    assert 0 < misread.sum() < 6
    options = {"steps": 5, "restarts": restarts, "seed": 1}
    some, every = (APGD(model, 0.02, attack_misclassified=a, **options)(x, y) for a in (False, True))
    assert torch.equal(some[misread], x[misread]) and not torch.equal(every[misread], x[misread])
    assert survivors(model, some, y) == survivors(model, every, y)


def test_targets_are_the_most_likely_other_classes() -> None:
    model, x, _ = linear()
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    APGD(model, 1e-9, steps=2, loss="dlr_targeted", n_target_classes=2)(x, model(x).argmax(1))
    assert len(rows) == 1 + 2 + 2 * 3  # ours, two of the clean x, and steps + 1 for each target
    with pytest.raises(ValueError, match=r"^loss='dlr_targeted' needs logits of at least 4 classes, got 3$"):
        APGD(lambda x: x[:, :3], loss="dlr_targeted")(torch.rand(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^loss='dlr' needs logits of at least 3 classes, got 2$"):
        APGD(lambda x: x[:, :2], loss="dlr")(torch.rand(2, 5), torch.zeros(2, dtype=torch.int64))


def test_eps_per_sample_fractions_and_zero() -> None:
    model, x, y = linear(torch.float32)
    eps = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    x_adv = APGD(model, eps, steps=30, bounds=WIDE, restarts=2, attack_misclassified=True)(x, y)
    torch.testing.assert_close((x_adv - x).abs().flatten(1).amax(1), eps.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(x_adv[0], x[0])
    assert torch.equal(APGD(model, "8/255", steps=5, seed=0)(x, y), APGD(model, 8 / 255, steps=5, seed=0)(x, y))


def test_a_seed_repeats_and_the_global_random_state_does_not_change() -> None:
    model, x, y = linear()
    before = torch.get_rng_state()
    first, again, other = (APGD(model, 0.1, steps=0, restarts=2, seed=s)(x, y) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_trace_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)).train()
    x, y = torch.rand(8, 1, 5, 5, requires_grad=True), torch.arange(8) % 4
    values, x_before = [t.clone() for t in model.state_dict().values()], x.detach().clone()
    with torch.no_grad():
        x_adv = APGD(model, 0.1, steps=5, loss="dlr_targeted")(x, y)
    assert not x_adv.requires_grad and x_adv.grad_fn is None and torch.equal(x, x_before) and x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values(), strict=True))
    assert all(m.training for m in model.modules()) and all(
        p.requires_grad and p.grad is None for p in model.parameters()
    )


def test_keywords_reach_the_model(robust_digits: tuple[RobustClassifier, Split]) -> None:
    model, images = robust_digits
    x, y = images.x[:16], images.y[:16]
    route = model.route(x).fixed(1)
    x_adv = APGD(model, 0.15, steps=5, restarts=2, seed=0)(x, y, routing=route)
    alone = APGD(lambda x: model(x, routing=model.route(x).fixed(1)), 0.15, steps=5, restarts=1, seed=0)(x, y)
    assert losses.cross_entropy(model(x_adv, routing=route), y).sum() >= losses.cross_entropy(
        model(alone, routing=route), y
    ).sum() * (1 - 1e-3)


def test_gradients_with_nan_are_counted_and_an_empty_batch_comes_back() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([x, torch.where(x > 0.5, (x - 0.5).sqrt(), 0)], 1)  # below 0.5 the gradient is 0 * NaN

    x, y = torch.tensor([[0.2], [0.9], [0.3]]), torch.zeros(3, dtype=torch.int64)
    attack = APGD(model, 0.05, steps=4, random_start=False)
    with pytest.warns(RuntimeWarning, match="8 of 12 gradients held a NaN"):
        assert attack(x, y).isfinite().all()
    assert attack(x[:0], y[:0]).shape == (0, 1) and attack.nan_gradients == 0


def test_draws_average_a_random_model() -> None:
    """Its gradient is a coin flip with a bias: one draw often steps the wrong way, the mean of many does not."""

    def model(x: Tensor) -> Tensor:
        noise = torch.randn(len(x), 1) * 3 + 1
        return torch.cat([-noise * x.sum(1, keepdim=True), torch.zeros(len(x), 1)], 1)

    x, y = torch.full((200, 4), 0.5), torch.zeros(200, dtype=torch.int64)
    options = {"steps": 1, "loss": "margin", "random_start": False, "attack_misclassified": True}
    right = [(APGD(model, 0.1, draws=n, **options)(x, y) > 0.5).all(1).float().mean() for n in (1, 64)]
    assert right[1] > right[0] + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L1"}, "norm must be 'Linf' or 'L2', got 'L1'"),
        ({"loss": "kl"}, "loss must be 'ce', 'dlr', 'dlr_targeted', 'margin' or a callable .*, got 'kl'"),
        ({"eps": "8/x"}, "eps must be finite"),
        ({"steps": -1}, "steps must be an integer >= 0, got -1"),
        ({"restarts": 2, "random_start": False}, "restarts must be 1 without random_start"),
        ({"n_target_classes": 0}, "n_target_classes must be an integer >= 1, got 0"),
        ({"draws": 0}, "draws must be an integer >= 1, got 0"),
        ({"bounds": (1, 0)}, "bounds must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        APGD(nn.Linear(3, 2), **options)


def test_bad_input_is_refused_as_by_pgd() -> None:
    x, y = torch.full((2, 3), 0.5), torch.tensor([0, 1])
    for bad_x, bad_y, message in (
        (x - 1, y, "x must lie within bounds"),
        (torch.where(x == x, math.nan, x), y, "x must hold no NaN"),
        (x, y + 2, "y must be less than the 3 classes"),
        (x, y[:1], r"y must be integer class labels \[B\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            APGD(lambda x: x)(bad_x, bad_y)
