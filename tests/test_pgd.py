"""PGD reaches the closed form on linear models, keeps the best, repeats itself and leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attacked import NORMS, WIDE, images, network, sizes, start
from torch import Tensor, nn

from moe_kernels.attacks import PGD, attack_mode


def logits_and_losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with attack_mode(model):
        logits = model(x)
    return logits, F.cross_entropy(logits, y, reduction="none")


def at_least_as_strong(model: nn.Module, strong: Tensor, weak: Tensor, y: Tensor) -> Tensor:
    """Asserts for every sample that `strong` is at least as strong as `weak`; returns where it is stronger."""
    (strong_logits, strong_loss), (weak_logits, weak_loss) = (logits_and_losses(model, x, y) for x in (strong, weak))
    strong_success, weak_success = strong_logits.argmax(1) != y, weak_logits.argmax(1) != y
    assert (strong_success | ~weak_success).all()
    same = strong_success == weak_success
    assert (strong_loss >= weak_loss - 1e-6)[same].all()
    return (strong_success & ~weak_success) | (same & (strong_loss > weak_loss + 1e-6))


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
    model, (x, _) = network().eval(), images(128)
    y = model(x).argmax(1)
    for best_iterate in (True, False):
        options = {"eps": 0.02, "alpha": 0.02, "steps": 2, "seed": 3, "best_iterate": best_iterate}
        one, five = (PGD(model, restarts=n, **options)(x, y) for n in (1, 5))
        assert at_least_as_strong(model, five, one, y).sum() > 16


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("best_iterate", [True, False])
def test_restarts_attack_only_samples_that_withstand(best_iterate: bool, loss: str) -> None:
    model, (x, _) = network().eval(), images(64)
    y = model(x).argmax(1)
    y[:9] = (y[:9] + 1) % 4  # which the model misclassifies
    options = {"eps": 0.03, "alpha": 0.01, "steps": 3, "seed": 3, "best_iterate": best_iterate, "loss": loss}
    every = PGD(model, attack_misclassified=True, **options)(x, y)
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    x_adv = PGD(model, restarts=4, **options)(x, y)
    sizes, forwards = sizes[1:], 4 + (loss == "kl")
    hook.remove()
    runs = sizes[::forwards]
    assert sizes == [n for n in runs for _ in range(forwards)] and runs[0] == 55 and runs == sorted(runs, reverse=True)
    left = int((model(x_adv).argmax(1) == y).sum())
    assert 55 > runs[1] > runs[3] >= left > 0
    assert torch.equal(x_adv[:9], x[:9]) and not torch.equal(every[:9], x[:9])


def test_a_loss_with_targets_of_the_whole_batch_gets_the_whole_batch() -> None:
    model, (x, y) = network(), images(8)
    target = torch.rand(8)
    x_adv = PGD(model, 0.1, 0.05, 2, loss=lambda logits, y: logits[:, 0] * target, restarts=3, seed=0)(x, y)
    assert (x_adv != x).flatten(1).any(1).all()


def test_a_target_that_is_reached_needs_no_attack() -> None:
    model, (x, _) = network().eval(), images(16)
    target = torch.full((16,), int(model(x).argmax(1)[0]))
    reached = model(x).argmax(1) == target
    x_adv = PGD(model, 0.1, 0.05, 3, targeted=True, restarts=2, seed=0)(x, target)
    assert 0 < reached.sum() < 16 and torch.equal(x_adv[reached], x[reached])
    assert not torch.equal(x_adv[~reached], x[~reached])


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
    second_moment = 1 / (d + 2) if norm == "L2" else 2 / ((d + 1) * (d + 2))  # of one coordinate, uniform in the ball
    assert (delta.square().mean(0) - second_moment).abs().max() < 0.004


def test_the_start_takes_eps_per_sample_and_bounds() -> None:
    eps = torch.tensor([0.0, 0.1, 0.4])
    delta = start(torch.zeros(3, 1000), eps=eps, alpha=0.1)
    assert delta.min() == 0
    torch.testing.assert_close(delta.amax(1), eps, rtol=0.02, atol=0)
    torch.testing.assert_close(delta.mean(1), eps / 4, rtol=0.2, atol=0)


def test_a_seed_repeats_and_none_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # conftest's seeds for attacks that have none
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
def test_the_global_random_state_does_not_change(norm: str, seed: int | None) -> None:
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


def test_keywords_reach_the_model_and_keep_their_graph() -> None:
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


@pytest.mark.parametrize(
    ("options", "forwards"),
    [({}, 4), ({"best_iterate": False}, 3), ({"restarts": 2}, 9), ({"restarts": 2, "best_iterate": False}, 9)],
)
def test_the_number_of_forwards(options: dict[str, Any], forwards: int) -> None:
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
