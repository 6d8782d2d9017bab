"""The correctness part of `make gpu`."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import gpu_calls
import pytest
import torch
from gpu_device import Device, Outputs, first_cases
from gpu_jobs import ROOT
from gpu_report import Report
from rt_er import ALPHA, EPS
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import PGD, RobustMoE, _library, attack_mode, pgd_step_, testing


def poison(on: bool) -> None:
    """Fills fresh memory with NaN, so that elements that are never written show."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on


def share(items: list[Any], which: str) -> list[Any]:
    """The items of a shard such as "3/8"; all items for ""."""
    first, step = map(int, which.split("/")) if which else (0, 1)
    return items[first::step]


def warm(device: Device, report: Report, which: str, tool: str) -> None:
    """Compiles Triton's kernels while nvcc compiles the others: first those that are timed, then those of the cases."""
    calls = [(f"warm {name}", call) for name, call in gpu_calls.triton_calls(device)]
    pairs = [(case, dtype) for case in device.cases for dtype in dtypes(device, case)]
    calls += [(f"warm {c} {str(d)[6:]}", lambda c=c, d=d: warm_case(device, c, d)) for c, d in pairs]
    for name, call in share(calls, which):
        report.check(name, call, "warm")


def warm_case(device: Device, case: testing.Case, dtype: torch.dtype) -> None:
    """Runs the case on the CPU, and on the device those of the operators it reaches that Triton computes."""
    for function, args in testing.reached(case, dtype):
        if function.name().split("::")[1].split(".")[0] in _library.TRITON:
            function(*(a.to(device.name) if isinstance(a, Tensor) else a for a in args))


def smoke(device: Device, report: Report, which: str, tool: str) -> None:
    """One case of every operator, with its gradients, against the reference. Everything after depends on this."""
    poison(True)
    failed = []
    for case in first_cases():
        dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes and not device.dry else torch.float32
        if not report.check(f"smoke {case} {str(dtype)[6:]}", lambda c=case, d=dtype: smoke_case(device, c, d)):
            failed.append(case.op)
    assert not failed, f"wrong: {', '.join(failed)}"


def smoke_case(device: Device, case: testing.Case, dtype: torch.dtype) -> None:
    testing.check_values(case, dtype, device.name)
    if case.has_gradient:
        testing.check_gradients(case, dtype, device.name)


def cases(device: Device, report: Report, which: str, tool: str) -> None:
    """Every case on the device: values, gradients, the same bits again, and the same bits on another stream."""
    poison(True)
    chosen = [c for c in device.cases if not tool or c.op in device.sanitized]
    pairs = [(c, dtype) for c in chosen for dtype in dtypes(device, c)[: 2 if tool else None]]
    for case, dtype in share(pairs, which):
        report.check(f"{case} {str(dtype)[6:]}", lambda c=case, d=dtype: check_case(device, c, d))


def dtypes(device: Device, case: testing.Case) -> list[torch.dtype]:
    """The device's dtypes that the case supports; fp16 wherever bf16 is supported."""
    return [d for d in device.dtypes if d in case.dtypes or _takes_half(case, d)]


def _takes_half(case: testing.Case, dtype: torch.dtype) -> bool:
    return dtype == torch.float16 and torch.bfloat16 in case.dtypes


def check_case(device: Device, case: testing.Case, dtype: torch.dtype) -> None:
    testing.check_values(case, dtype, device.name)
    if case.has_gradient:
        testing.check_gradients(case, dtype, device.name)
    testing.check_repeats(case, dtype, device.name)
    expected = everything(case, dtype, device)
    with device.side_stream():
        late = everything(case, dtype, device)
    assert_equal(late, expected)


def everything(case: testing.Case, dtype: torch.dtype, device: Device) -> Outputs:
    """Results and gradients from copies of the arguments, all made on the current stream."""
    args = [a.detach().clone() if isinstance(a, Tensor) else a for a in case.arguments(dtype, device.name)]
    outputs = testing.as_tuple(testing.operator(case)(*args))
    if not case.has_gradient:
        return outputs
    grads = [torch.ones_like(y) for y in outputs if y.is_floating_point()]
    needed = testing.differentiable(args, case.buffers)
    return (*outputs, *testing.gradients(testing.operator(case), args, needed, grads))


def assert_equal(ours: Outputs, theirs: Outputs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), f"differs by {(a.double() - b.double()).abs().max():.3e}"


def kernel_tests(device: Device, report: Report, which: str, tool: str) -> None:
    """The tests of the Triton kernels that go beyond their operators: tiles, epilogues, descriptors."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_triton_expert_*.py"))]
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    if not device.dry and importlib.util.find_spec("xdist"):
        options += ["-n", "4"]

    def run() -> None:
        status = pytest.main([*options, *files, *device.pytest_options])
        assert status == 0, f"pytest ended with {status!r}"

    report.check("tests of the Triton kernels", run)


class LayerStep:
    """Route to combine, forward and backward, on the same input tensors every time."""

    def __init__(self, device: Device, activation: str) -> None:
        dim, hidden, experts, rows = device.layer
        self.moe = RobustMoE(dim, hidden, experts, 2, activation=activation, device=device.name)
        self.x = torch.randn(rows, dim, device=device.name, requires_grad=True)
        self.grad = torch.randn(rows, dim, device=device.name)

    def __call__(self) -> Outputs:
        y = self.moe(self.x)
        return (y, *torch.autograd.grad(y, [self.x, *self.moe.parameters()], self.grad))

    def renew(self) -> None:
        self.x.detach().normal_()
        self.grad.normal_()


class AttackSteps:
    """PGD from x on a mixture of ResNets, from public parts: `PGD` itself, which reads x and y, cannot be captured.

    To be called inside `attack_mode`.
    """

    def __init__(self, device: Device, where: str = "") -> None:
        width, size, batch, self.steps = device.attack
        to: dict[str, Any] = {"device": where or device.name}
        self.model = gpu_calls.mixture(4, width, size, **to)
        self.x = torch.rand(batch, 3, size, size, **to)
        self.y = torch.randint(10, (batch,), **to)

    def __call__(self) -> Outputs:
        x_adv = self.x.clone()
        for _ in range(self.steps):
            leaf = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(self.model(leaf), self.y, reduction="sum")
            pgd_step_(x_adv, torch.autograd.grad(loss, [leaf])[0], self.x, EPS, ALPHA)
        return (x_adv,)

    def renew(self) -> None:
        self.x.uniform_()
        self.y.random_(10)

    def eager(self) -> Outputs:
        return (self.pgd(capture=False)(self.x, self.y),)

    def pgd(self, capture: bool | str) -> PGD:
        options = {"random_start": False, "best_iterate": False, "capture": capture}
        return PGD(self.model, EPS, ALPHA, self.steps, **options)


def graphs(device: Device, report: Report, which: str, tool: str) -> None:
    """Replays on new data of what was captured once give the same bits as eager runs."""
    poison(True)
    for activation in ("gelu", "swiglu"):
        step = LayerStep(device, activation)
        report.check(f"captured layer, {activation}", lambda s=step: check_replay(device, s, s.renew, s))
    attack = AttackSteps(device)

    def captured_attack() -> None:
        with attack_mode(attack.model):
            check_replay(device, attack, attack.renew, attack.eager)

    def attack_that_captures_itself() -> None:
        pgd = attack.pgd(capture="auto")
        for _ in range(2):
            attack.renew()
            assert_equal((pgd(attack.x, attack.y),), attack.eager())

    report.check(f"captured PGD-{attack.steps}", captured_attack)
    report.check(f'PGD-{attack.steps}(capture="auto")', attack_that_captures_itself)
    if not device.dry and torch.cuda.device_count() > 1:
        report.check("PGD on cuda:1 while cuda:0 is current", lambda: check_captured_pgd(AttackSteps(device, "cuda:1")))


def first_act(device: Device, report: Report, which: str, tool: str) -> None:
    """A captured PGD before anything else in its process, when no kernel is loaded and no library has tuned itself."""
    poison(True)
    report.check("a captured PGD first of all", lambda: check_captured_pgd(AttackSteps(device)))


def check_captured_pgd(attack: "AttackSteps") -> None:
    captured = attack.pgd(capture="auto")(attack.x, attack.y)
    assert_equal((captured,), attack.eager())


def check_replay(
    device: Device, function: Callable[[], Outputs], renew: Callable[[], None], eager: Callable[[], Outputs]
) -> None:
    outputs, replay = device.capture(function)
    for _ in range(2):
        renew()
        replay()
        assert_equal(outputs, eager())


def syncs(device: Device, report: Report, which: str, tool: str) -> None:
    """Checks that the host never waits between router and combine, nor between the steps of an attack."""
    layer, attack = LayerStep(device, "gelu"), AttackSteps(device)

    def check(function: Callable[[], Any]) -> None:
        function()  # compiles
        with device.no_sync():
            function()

    report.check("the host does not wait in the layer", lambda: check(layer))
    with attack_mode(attack.model):
        report.check("the host does not wait in the attack", lambda: check(attack))


def compilation(device: Device, report: Report, which: str, tool: str) -> None:
    """opcheck of the operators, and the layer under torch.compile without a graph break."""
    for case in first_cases():
        report.check(f"opcheck {case.op}", lambda c=case: testing.check_opcheck(c, False, device.name))

    def compiled_layer() -> None:
        step = LayerStep(device, "gelu")
        compiled = copy.copy(step)
        compiled.moe = torch.compile(step.moe, fullgraph=True, backend=device.compiler)
        for ours, theirs in zip(compiled(), step(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    report.check("torch.compile(RobustMoE, fullgraph=True)", compiled_layer)
