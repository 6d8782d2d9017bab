"""Attacks with compile=True: those without to rounding, on a frozen model that is then what it was."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from moe_kernels import APGD, PGD
from moe_kernels.testing.networks import randomize_statistics

X, Y = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


def network(width: int = 5) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 4)
    return randomize_statistics(nn.Sequential(*layers)).train()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("attack", [PGD, APGD])
def test_the_attack_is_the_same_to_rounding_and_leaves_the_model_as_it_was(attack: type[PGD | APGD]) -> None:
    """Also for other sizes of batches, which are compiled once together, and after a step of an optimiser."""
    torch.compiler.reset()
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"eps": 0.5, "norm": "L2", "steps": 3, "seed": 0, "attack_misclassified": True}  # smooth, unlike a sign
    compiled, plain = attack(model, **options, compile=True), attack(model, **options)
    before, made = graphs(), []
    for rows in (4, 6, 5, 4):
        torch.testing.assert_close(compiled(X[:rows], Y[:rows]), plain(X[:rows], Y[:rows]), atol=1e-5, rtol=1e-4)
        made.append(graphs() - before)
    assert made[0] == 1 and made[-1] <= 3 and made[1:] == made[1:2] * 3
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    found = compiled(X, Y)
    torch.testing.assert_close(found, plain(X, Y), atol=1e-5, rtol=1e-4)
    assert graphs() - before == made[-1] and not torch.equal(found, X)


def test_another_model_is_compiled_anew_and_keywords_reach_it() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            y: Tensor = self.inner(scale * x)
            return y

    options = {"eps": 0.5, "norm": "L2", "steps": 2, "seed": 0}
    models = [Scaled(nn.Sequential(nn.Flatten(), nn.Linear(108, 4))) for _ in range(2)]
    attack = PGD(models[0], **options, compile=True)
    for model in models:
        attack.model = model
        expected = PGD(model, **options)(X, Y, scale=2.0)
        torch.testing.assert_close(attack(X, Y, scale=2.0), expected, atol=1e-5, rtol=1e-4)


def test_what_torch_cannot_compile_is_one_line() -> None:
    model = network(7)
    with (
        torch._inductor.config.patch({"force_disable_caches": True, "cpp.cxx": ("/no/such/compiler",)}),
        pytest.raises(RuntimeError, match="compile must be False for this model") as raised,
    ):
        PGD(model, compile=True)(X, Y)
    assert str(raised.value).count("\n") == 0
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_torch_alone_chooses_what_is_computed_again() -> None:
    for attack in (PGD, APGD):
        with pytest.raises(ValueError, match=r"recompute must be .none. with compile=True"):
            attack(network(), recompute="activations", compile=True)
