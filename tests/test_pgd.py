"""PGD reaches the closed form on linear models, keeps the best, repeats itself and leaves no trace."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.attacks import PGD, attack_mode

WIDE = (-10.0, 10.0)
NORMS = {"Linf": math.inf, "L2": 2, "L1": 1}


def sizes(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), NORMS[norm], dim=1)


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, classes)
        )


def images(batch: int = 16, classes: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, 5, 5, dtype=dtype), torch.arange(batch) % classes


def logits_and_losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with attack_mode(model):
        logits = model(x)
    return logits, F.cross_entropy(logits, y, reduction="none")


def at_least_as_strong(model: nn.Module, strong: Tensor, weak: Tensor, y: Tensor) -> Tensor:
    """Asserts it for every sample; returns where `strong` is truly stronger."""
    (strong_logits, strong_loss), (weak_logits, weak_loss) = (logits_and_losses(model, x, y) for x in (strong, weak))
    strong_success, weak_success = strong_logits.argmax(1) != y, weak_logits.argmax(1) != y
    assert (strong_success | ~weak_success).all()
    same = strong_success == weak_success
    assert (strong_loss >= weak_loss - 1e-6)[same].all()
    return (strong_success & ~weak_success) | (same & (strong_loss > weak_loss + 1e-6))


def start(x: Tensor, **options: Any) -> Tensor:
    y = torch.zeros(len(x), dtype=torch.int64)
    return PGD(lambda x: x, steps=0, best_iterate=False, **options)(x, y)


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_a_linear_model(norm: str, loss: str, random_start: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(2, 12, dtype=torch.float64)
    x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    up = (weight[1 - y] - weight[y]).view_as(x)  # the gradient of the margin
    if norm == "Linf":
        direction = up.sign()
    elif norm == "L2":
        direction = up / sizes(up, "L2").view(5, 1, 1)
    else:
        largest = up.abs() == sizes(up, "Linf").view(5, 1, 1)
        direction = up.sign() * largest
    attack = PGD(lambda x: x.flatten(1) @ weight.T, 0.5, 1.0, 60, norm, loss, random_start, bounds=WIDE)
    torch.testing.assert_close(attack(x, y), x + 0.5 * direction, rtol=0, atol=1e-6)


def test_bounds_hold() -> None:
    x, y = images()
    x_adv = PGD(network(), eps=0.5, alpha=0.2)(x, y)
    assert x_adv.min() == 0 and x_adv.max() == 1


@pytest.mark.parametrize("norm", NORMS)
def test_eps_and_alpha_per_sample(norm: str) -> None:
    x, y = images(4)
    eps = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)
    x_adv = PGD(network(), eps, eps / 2, norm=norm, bounds=WIDE)(x, y)
    torch.testing.assert_close(sizes(x_adv - x, norm), eps.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(x_adv[0], x[0])
    x_adv = PGD(network(), 1.0, eps / 2, steps=1, norm=norm, bounds=WIDE, random_start=False, best_iterate=False)(x, y)
    torch.testing.assert_close(sizes(x_adv - x, norm), eps.float() / 2, rtol=1e-4, atol=1e-6)


def test_numbers_may_be_fractions() -> None:
    x, y = images()
    assert torch.equal(PGD(network(), "8/255", "2/255", seed=0)(x, y), PGD(network(), 8 / 255, 2 / 255, seed=0)(x, y))


def test_zero_eps_changes_nothing() -> None:
    x, y = images()
    assert torch.equal(PGD(network(), 0)(x, y), x)


def test_restarts_are_never_worse() -> None:
    model, (x, y) = network(), images(64)
    for best_iterate in (True, False):
        options = {"eps": 0.1, "alpha": 0.1, "steps": 2, "seed": 3, "best_iterate": best_iterate}
        one, five = (PGD(model, restarts=n, **options)(x, y) for n in (1, 5))
        assert at_least_as_strong(model, five, one, y).sum() > 16


@pytest.mark.parametrize("restarts", [1, 3])
def test_the_best_iterate_is_never_worse_than_the_last(restarts: int) -> None:
    model, (x, y) = network(), images(64)
    options = {"eps": 0.3, "alpha": 0.6, "steps": 5, "seed": 3, "restarts": restarts}
    best, last = (PGD(model, best_iterate=b, **options)(x, y) for b in (True, False))
    assert at_least_as_strong(model, best, last, y).sum() > 4


def test_the_last_iterate_may_be_the_best() -> None:
    def model(x: Tensor) -> Tensor:
        return F.pad(x, (0, 1))

    x, y = torch.full((1, 1), 0.5), torch.tensor([0])
    x_adv = PGD(model, eps=0.2, alpha=0.2, steps=1, random_start=False)(x, y)
    torch.testing.assert_close(x_adv, x - 0.2)


def test_success_comes_before_loss() -> None:
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


def test_the_linf_start_is_uniform() -> None:
    delta = start(torch.full((200, 3, 8, 8), 0.5), eps=0.1, bounds=(0, 1)) - 0.5
    assert delta.abs().max() <= 0.1 and delta.abs().max() > 0.0999
    assert abs(delta.mean()) < 0.002
    assert abs((delta.abs() > 0.09).float().mean() - 0.1) < 0.01


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_the_start_fills_the_ball(norm: str) -> None:
    d = 4
    delta = start(torch.zeros(20_000, 2, 2), eps=0.3, norm=norm, bounds=WIDE).flatten(1) / 0.3
    size = sizes(delta, norm)
    assert size.max() <= 1 + 1e-6
    assert abs((size**d).mean() - 1 / 2) < 0.01  # size^d is uniform in [0, 1]
    assert abs((size**d < 0.25).float().mean() - 0.25) < 0.01
    assert delta.mean(0).abs().max() < 0.01
    second_moment = 1 / (d + 2) if norm == "L2" else 2 / ((d + 1) * (d + 2))  # of a coordinate, uniform in the ball
    assert (delta.square().mean(0) - second_moment).abs().max() < 0.004


def test_the_start_takes_eps_per_sample_and_bounds() -> None:
    eps = torch.tensor([0.0, 0.1, 0.4])
    delta = start(torch.zeros(3, 1000), eps=eps, alpha=0.1)
    assert delta.min() == 0
    torch.testing.assert_close(delta.amax(1), eps, rtol=0.02, atol=0)
    torch.testing.assert_close(delta.mean(1), eps / 4, rtol=0.2, atol=0)


def test_a_seed_repeats_and_none_does_not() -> None:
    model, (x, y) = network(), images()
    seeded, fresh = PGD(model, steps=1, seed=1), PGD(model, steps=1)
    first = seeded(x, y)
    torch.rand(7)
    assert torch.equal(first, seeded(x, y))
    assert not torch.equal(first, PGD(model, steps=1, seed=2)(x, y))
    torch.manual_seed(0)
    unseeded = fresh(x, y)
    torch.manual_seed(0)
    assert not torch.equal(unseeded, fresh(x, y))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", [None, 5])
def test_the_global_random_state_stays(norm: str, seed: int | None) -> None:
    x, y = images()
    before = torch.get_rng_state()
    PGD(network().train(), norm=norm, seed=seed, restarts=2)(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_trace_is_left() -> None:
    model, (x, y) = network().train(), images()
    x.requires_grad_()
    model(x).sum().backward()
    grads = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    values, x_before, y_before = [t.clone() for t in model.state_dict().values()], x.detach().clone(), y.clone()
    x_adv = PGD(model)(x, y)
    assert not x_adv.requires_grad and x_adv.grad_fn is None
    assert torch.equal(x, x_before) and torch.equal(y, y_before) and x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, [x, *model.parameters()], strict=True))
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    PGD(model, eps=0)(x.detach(), y).fill_(0.5)
    assert torch.equal(x, x_before)


def test_the_model_is_restored_when_it_raises() -> None:
    class Faulty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.body[1].running_mean += 1
            if self.calls == 3:
                raise OverflowError
            return self.body(x)

    model, (x, y) = Faulty(), images()
    before, rng = model.body[1].running_mean.clone(), torch.get_rng_state()
    with pytest.raises(OverflowError):
        PGD(model)(x, y)
    assert torch.equal(model.body[1].running_mean, before)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_any_grad_mode(context: Callable[[], Any], loss: str) -> None:
    model, (x, y) = network(), images()
    attack = PGD(model, loss=loss, seed=0)
    expected = attack(x, y)
    with context():
        assert torch.equal(attack(x.clone(), y.clone()), expected)
    assert (expected - x).abs().amax() == pytest.approx(8 / 255, rel=1e-3)


def test_dtype_and_memory_format_are_kept() -> None:
    x, y = images(dtype=torch.float64)
    x_adv = PGD(network().double())(x, y)
    assert x_adv.dtype == torch.float64
    channels_last = x.to(memory_format=torch.channels_last)
    for options in ({"norm": "L2", "restarts": 2}, {"random_start": False}, {"best_iterate": False}):
        x_adv = PGD(network().double(), **options)(channels_last, y)
        assert x_adv.is_contiguous(memory_format=torch.channels_last)


def test_autocast_is_followed() -> None:
    model, (x, y) = network(), images()
    seen: set[torch.dtype] = set()
    model[5].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        assert logits.dtype == torch.float32 and (logits @ logits.T).dtype == torch.float32
        return F.cross_entropy(logits, y, reduction="none")

    for each in (loss, "ce", "kl", "margin"):
        with torch.autocast("cpu", torch.bfloat16):
            x_adv = PGD(model, loss=each)(x, y)
        assert seen == {torch.bfloat16} and x_adv.dtype == torch.float32
        assert (x_adv - x).abs().max() == pytest.approx(8 / 255, rel=1e-3)


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


def test_a_target_reached_is_kept() -> None:
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


def test_keywords_reach_the_model_and_their_graph_survives() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return sum(w[:, None] * e(x) for w, e in zip(weights.unbind(1), self.experts, strict=True))

    model, router = Gated(), nn.Linear(6, 2)
    x, y = torch.rand(8, 6), torch.arange(8) % 3
    only = [torch.tensor([w]).expand(8, 2) for w in ([1.0, 0.0], [0.0, 1.0])]
    for expert, weights in zip(model.experts, only, strict=True):
        assert torch.equal(PGD(model, seed=0)(x, y, weights=weights), PGD(expert, seed=0)(x, y))
    weights = router(x).softmax(1)
    PGD(model)(x, y, weights=weights)
    model(x, weights).sum().backward()
    assert router.weight.grad.any()


def test_a_callable_loss() -> None:
    x, y = images()
    model = network()
    ours = PGD(model, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"), seed=0)
    assert torch.equal(ours(x, y), PGD(model, seed=0)(x, y))


def test_margin_is_the_distance_to_the_strongest_other_class() -> None:
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1])
    by_hand = PGD(lambda x: x, 0.1, 0.1, 1, loss="margin", random_start=False, bounds=WIDE)(logits, y)
    torch.testing.assert_close(by_hand - logits, torch.tensor([[-0.1, 0.0, 0.1], [0.1, -0.1, 0.0]]))


@pytest.mark.parametrize(
    ("options", "forwards"),
    [({}, 4), ({"best_iterate": False}, 3), ({"restarts": 2}, 8), ({"restarts": 2, "best_iterate": False}, 8)],
)
def test_forwards(options: dict[str, Any], forwards: int) -> None:
    model, (x, y) = network(), images()
    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    PGD(model, steps=3, **options)(x, y)
    assert len(calls) == forwards


def test_an_empty_batch_comes_back() -> None:
    x_adv = PGD(network())(torch.rand(0, 3, 5, 5), torch.zeros(0, dtype=torch.int64))
    assert x_adv.shape == (0, 3, 5, 5)


def test_labels_may_be_any_integers() -> None:
    x, y = images()
    expected = PGD(network(), seed=0)(x, y)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(PGD(network(), seed=0)(x, y.to(dtype)), expected)
