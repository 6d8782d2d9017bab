"""The nine defects of RT-ER's public code: each test measures a defect's effect, here and in a naive version."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rter.data.split import Data, Split
from rter.methods import METHODS, step
from rter.methods.step import Step
from rter.methods.update import update
from rter.models.build import build_model
from rter.models.classifier import DualClassifier, Normalize, RobustClassifier
from rter.settings import make_config
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, ExpertResNet18, RobustMoE


def random_batch(size: int = 8, classes: int = 3, image: tuple[int, int, int] = (1, 6, 6)) -> Split:
    return Split(0.3 + 0.4 * torch.rand(size, *image), torch.randint(classes, (size,)))


def tiny(batch: Split, classes: int = 3, **settings: Any) -> Step:
    config = make_config(**{"method": "rt-er", "num_experts": 3, "width": 2, "attack_steps": 3, **settings})
    return Step(build_model(config, Data(batch, batch, classes)).train(), config, 0, epoch=config.epochs)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def naive_pgd(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The public code's attack: stays in eval mode, mean-reduced loss; returns x_adv and its last gradient."""
    model.eval()
    x_adv, grad = x + (torch.zeros_like(x) if start is None else start), torch.zeros_like(x)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        loss.backward()
        grad = x_adv.grad
        x_adv = x + (x_adv + eps / 4 * grad.sign() - x).clamp(-eps, eps)
    return x_adv, grad


def test_1_the_attack_starts_at_the_random_start() -> None:
    batch = random_batch(64)
    own = tiny(batch)
    eps = own.config.eps
    start = own.attack(own.model, steps=0)(batch.x, batch.y) - batch.x

    def at_the_edge(offset: Tensor) -> float:
        return (offset <= -eps * (1 - 1e-5)).double().mean().item()

    mean, std = 0.47, 0.25
    naive = ((2 * torch.rand_like(batch.x) - 1) * eps - mean) / std  # the normaliser applied to a perturbation
    assert at_the_edge(naive.clamp(-eps, eps)) > 0.9
    assert at_the_edge(start) < 0.01
    assert start.mean().abs() < 0.05 * eps and start.abs().max() <= eps * (1 + 1e-6)
    assert (start.std() / (eps / 3**0.5) - 1).abs() < 0.05  # uniform


def test_2_the_attack_leaves_batch_norm_in_training_mode() -> None:
    batch = random_batch()
    experts = ExpertResNet18(3, 3, 1, width=2)
    router = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    model = RobustClassifier(Normalize(batch.x), RobustMoE.from_experts(experts, router, gate="straight_through"))
    modes: list[bool] = []
    experts.bn1.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    run = replace(tiny(batch), model=model.train())
    update(run, sgd(model), batch)
    assert set(modes) == {False, True} and modes == sorted(modes)  # the attack, then the loss
    assert all(module.training for module in model.modules())
    naive_pgd(model, batch.x, batch.y, 0.1, 1)
    assert not any(module.training for module in model.modules())


def test_3_no_loop_over_images() -> None:
    def forwards(size: int, act: Callable[[Step, Split], Any]) -> int:
        batch, calls = random_batch(size), []
        run = tiny(batch)
        run.model.moe.experts.conv1.register_forward_hook(lambda *_: calls.append(1))
        act(run, batch)
        return len(calls)

    def ours(run: Step, batch: Split) -> None:
        update(run, sgd(run.model), batch)

    def naive(run: Step, batch: Split) -> None:  # one forward of one loss
        torch.cat([run.model(image) for image in batch.x.split(1)])

    assert forwards(2, ours) == forwards(16, ours) == 4  # three attack steps on both attacks at once, then the loss
    assert (forwards(2, naive), forwards(16, naive)) == (2, 16)


@pytest.mark.parametrize("gate", ["softmax", "straight_through", "hard"])
def test_4_the_router_has_a_gradient_path(gate: str) -> None:
    batch = random_batch()
    run = tiny(batch, gate=gate, balance_weight=0)
    router = run.model.moe.router[1].weight
    before = router.clone()
    loss = METHODS["rt-er"].passes[0].make_loss(run, batch.x, batch.y)()["adversarial"]
    (grad,) = torch.autograd.grad(loss, [router], allow_unused=True)
    route = run.model.route(batch.x)
    every = torch.stack([run.model(batch.x, routing=route.fixed(e)) for e in range(3)], 1)
    naive = every[torch.arange(len(batch)), route.logits.argmax(1)]  # the chosen expert's logits as they are
    assert torch.autograd.grad(naive.sum(), [router], allow_unused=True) == (None,)
    update(run, sgd(run.model), batch)
    if gate == "hard":  # the public code's: no gradient, and then no weight decay either
        assert grad is None and torch.equal(router, before)
    else:
        assert grad is not None and grad.abs().max() > 0 and not torch.equal(router, before)


def test_5_gradients_do_not_underflow_in_16_bits() -> None:
    batch = random_batch(512)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        model[1].weight.mul_(0.5)
        model[1].bias.copy_(torch.tensor([0.0, 10.0, 0.0]))
    certain = Split(batch.x, torch.ones(512, dtype=torch.int64))  # p_y = 0.9999: the gradient of each image is small
    with torch.autocast("cpu", torch.float16):
        _, naive = naive_pgd(model, certain.x, certain.y, 0.1, 1)
        attack = PGD(model, 0.1, 0.025, 1, seed=0)
        attack(certain.x, certain.y)
    assert (naive.flatten(1) == 0).all(1).double().mean() > 0.9
    assert attack.zero_gradients == 0


def test_6_the_attack_builds_no_graph_of_the_parameters() -> None:
    batch = random_batch()
    run = tiny(batch)
    frozen: list[bool] = []
    run.model.moe.experts.conv1.register_forward_pre_hook(
        lambda module, _: frozen.append(not any(p.requires_grad for p in module.parameters()))
    )
    x_adv = run.attack(run.model)(batch.x, batch.y)
    assert frozen == [True, True, True] and not x_adv.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in run.model.parameters())
    naive, _ = naive_pgd(run.model, batch.x, batch.y, 0.1, 1)
    assert naive.requires_grad and any(parameter.grad is not None for parameter in run.model.parameters())


def test_7_jtdmoe_steps_no_stale_gradient_and_attacks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch()
    run = tiny(batch, method="jtdmoe")
    attacks = counted(monkeypatch)
    optimizer = sgd(run.model)
    moved: list[set[str]] = []
    plain_step, state = optimizer.step, {name: value.clone() for name, value in run.model.state_dict().items()}

    def step() -> None:
        plain_step()
        now = {name: value.clone() for name, value in run.model.state_dict().items()}
        moved.append({name.split(".")[0] for name in now if not torch.equal(now[name], state[name])})
        state.update(now)

    monkeypatch.setattr(optimizer, "step", step)
    for index in range(2):
        update(replace(run, index=index), optimizer, batch)
    assert moved == [{"moe"}, {"standard"}] * 2
    assert attacks == [4 * len(batch)] * 2  # the MoE and its three experts, as one batch, once for each update

    naive = tiny(batch, method="jtdmoe")
    assert isinstance(naive.model, DualClassifier)
    before = naive.model.moe.experts.head.weight.clone()
    both = sgd(naive.model)
    F.cross_entropy(naive.model(batch.x), batch.y).backward()  # the standard step, gradients of F_R left in place
    both.step()
    assert not torch.equal(naive.model.moe.experts.head.weight, before)


def test_8_every_draw_follows_from_the_seed() -> None:
    batch = random_batch()

    def trained(seed: int) -> list[Tensor]:
        torch.rand(3)  # the global random state does not matter
        run = tiny(batch, seed=seed)
        optimizer = sgd(run.model)
        for index in range(2):
            update(replace(run, index=index, epoch=0), optimizer, batch)
        return list(run.model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(0), trained(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained(0), trained(1), strict=True))

    def naive() -> Tensor:
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))  # drawn from the global random state, as is the start
        start = 0.1 * (2 * torch.rand_like(batch.x) - 1)
        return naive_pgd(model, batch.x, batch.y, 0.1, 1, start)[0]

    assert not torch.equal(naive(), naive())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("experts", "classes", "image"), [(2, 2, (1, 5, 4)), (5, 7, (3, 9, 9))])
def test_9_experts_classes_and_image_size_are_free(
    method: str, experts: int, classes: int, image: tuple[int, int, int]
) -> None:
    batch = random_batch(6, classes, image)
    run = tiny(batch, classes, method=method, num_experts=9 if method == "nine-experts" else experts, attack_steps=1)
    assert update(run, sgd(run.model), batch)["loss"].isfinite()
    assert run.model(batch.x).shape == (6, classes)
    naive = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))  # the public code's router
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        naive(batch.x)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every attack that runs."""
    sizes: list[int] = []
    make: Callable[..., PGD] = step.make_attack

    def make_counting(*args: Any, **options: Any) -> Callable[..., Tensor]:
        attack = make(*args, **options)

        def run(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
            sizes.append(len(x))
            return attack(x, y, **kwargs)

        return run

    monkeypatch.setattr(step, "make_attack", make_counting)
    return sizes
