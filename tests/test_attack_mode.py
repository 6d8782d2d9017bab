"""attack_mode freezes a model and leaves no trace, whatever happens inside."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.attacks import attack_mode


class AlwaysTrainingNorm(nn.BatchNorm1d):
    """Updates its statistics in eval mode, too, as careless models do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.5, self.eps)


def network() -> nn.Sequential:
    """Modes, requires_grad and gradients all differ from module to module."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), AlwaysTrainingNorm(4), nn.Linear(4, 2))
    model(torch.randn(8, 3)).sum().backward()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[4].bias.grad = None
    return model


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    modes = [m.training for m in model.modules()]
    parameters = [(p, p.requires_grad, p.grad, p.grad_fn) for p in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = list(model.buffers())
    state = copy.deepcopy(model.state_dict())
    versions = [t._version for t in model.state_dict(keep_vars=True).values()]
    rng = torch.get_rng_state()
    yield
    assert [m.training for m in model.modules()] == modes
    assert len(list(model.parameters())) == len(parameters)
    for (p, requires_grad, grad, grad_fn), q, value in zip(parameters, model.parameters(), gradients, strict=True):
        assert q is p and q.requires_grad == requires_grad and q.grad is grad and q.grad_fn is grad_fn
        assert grad is None or torch.equal(grad, value)
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert [t._version for t in model.state_dict(keep_vars=True).values()] == versions
    assert torch.equal(torch.get_rng_state(), rng)


def leave(model: nn.Module) -> None:
    pass


def run_forward(model: nn.Module) -> None:
    model(torch.randn(8, 3))


def meddle(model: nn.Module) -> None:
    model.train()
    model.requires_grad_(True)
    model(torch.randn(8, 3)).sum().backward()
    model[1].running_mean = torch.full((4,), 7.0)
    model[3].running_var.zero_()


def interrupt(model: nn.Module) -> None:
    model(torch.randn(8, 3))
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [leave, run_forward, meddle, interrupt])
def test_everything_is_restored(action: Callable[[nn.Module], None]) -> None:
    model = network()
    with unchanged(model):
        try:
            with attack_mode(model):
                action(model)
        except KeyboardInterrupt:
            assert action is interrupt


def test_the_model_does_not_change_inside() -> None:
    model = network()
    x = torch.randn(8, 3, requires_grad=True)
    with attack_mode(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        y = model(x)
        assert torch.equal(y, model(x))  # no dropout
        (grad,) = torch.autograd.grad(y.sum(), [x])
    assert grad.shape == x.shape


def test_a_graph_that_saved_the_statistics_survives() -> None:
    model = network()
    loss = model(torch.randn(8, 3)).sum()
    with attack_mode(model):
        run_forward(model)
    loss.backward()


def test_can_be_nested_and_reused() -> None:
    model, other = network(), network()
    mode = attack_mode(model)
    with unchanged(model), unchanged(other):
        with mode, attack_mode(other), mode, attack_mode(model):
            model.train()
            meddle(model)
        with mode:
            with pytest.raises(RuntimeError), mode:
                raise RuntimeError
            assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_shared_parameters_and_buffers() -> None:
    model = nn.Sequential(network(), network())
    model[1][0].weight = model[0][0].weight
    model[1][1].running_mean = model[0][1].running_mean
    with unchanged(model):
        with attack_mode(model):
            assert model[1][1].running_mean is model[0][1].running_mean
            model[0][1].running_mean.fill_(3)
        assert model[1][1].running_mean is model[0][1].running_mean


def test_a_buffer_that_is_first_filled_inside_is_empty_again() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", None)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = x.mean(0) if self.mean is None else self.mean
            return x - self.mean

    model = Centred()
    with attack_mode(model):
        model(torch.randn(8, 3))
    assert model.mean is None


def test_inside_functional_call() -> None:
    class Attacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.net.weight
            with attack_mode(self.net):
                assert not self.net.weight.requires_grad and torch.equal(self.net.weight, weight)
            assert self.net.weight is weight
            return self.net(x)

    model = Attacked()
    parameters = {name: 2 * p for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, parameters, torch.randn(8, 3))
    assert all(g is not None for g in torch.autograd.grad(y.sum(), list(parameters.values())))


def test_threads_attack_one_after_the_other() -> None:
    model = network()

    def attack(*_: int) -> None:
        for _ in range(20):
            with attack_mode(model):
                run_forward(model)
                assert not model.training

    with unchanged(model), ThreadPoolExecutor(4) as threads:
        list(threads.map(attack, range(8)))


def test_overridden_train_does_not_run() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("must not be called")

    model = Merging(2, 2)
    with attack_mode(model):
        assert not model.training
    assert model.training


def test_lazy_modules_initialise_inside_and_stay_initialised() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with attack_mode(model):
        model(torch.randn(8, 3))
        assert not any(p.requires_grad for p in model.parameters())
    assert model[0].weight.shape == (4, 3) and model[1].running_mean.shape == (4,)
    assert model.training and model[1].training and all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_module() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    before = copy.deepcopy(model.state_dict())
    with attack_mode(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        model(torch.randn(8, 3))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_any_callable() -> None:
    rng = torch.get_rng_state()
    with attack_mode(torch.sin):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), rng)
