"""The scripts of `make bench` at toy size: what they print follows from what they measure."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_kernels import ExpertResNet18, RobustMoE
from moe_kernels.attacks import rules
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, ViT

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SMALL_NETWORKS = """
import sys
from functools import partial
import pytest, bench_attack, bench_rt_er, conftest
conftest.ALL_ROUNDS = 0.1
bench_attack.ResNet18 = partial(bench_attack.ResNet18, width=4)
bench_rt_er.ExpertResNet18 = partial(bench_rt_er.ExpertResNet18, width=4)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "conftest", raising=False)  # theirs, not ours


def python(*arguments: object, **environment: str) -> str:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", BENCHMARKS)))
    alone = {"OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": ""}  # beside others pytest-benchmark does not time
    environment = {**os.environ, "PYTHONPATH": path, **alone, **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_benchmarks_run() -> None:
    """All files, with small networks and the smallest of the other shapes."""
    names = ("bench_attack.py", "bench_rt_er.py", "bench_expert_linear.py", "bench_pgd_step_.py", "bench_robust_moe.py")
    files = [BENCHMARKS / name for name in (*names, "bench_routing.py", "bench_train_step.py", "bench_cond_conv.py")]
    assert sorted(files) == sorted(BENCHMARKS.glob("bench_*.py"))
    ours = "test_recompute or moe_kernels and (small_part or train_step and 16 or 512 and combine)"
    others = f"(test_layer and not moe_kernels and 64 and 8) or (128 and fp32) or (pgd_step_ and 256) or ({ours})"
    small = f"(moe_kernels and (test_core or test_bf16 or rt_er and fp32)) or (test_core and 16 and frozen) or {others}"
    options = ("-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "--benchmark-disable")
    assert " passed" in python("-c", SMALL_NETWORKS, *options, *files, "-k", small)


def test_a_timing_becomes_a_ratio_with_a_verdict(tmp_path: Path) -> None:
    case = "test_forward[{}-(1024, 64, 128, 8)-fp32]"
    cases = [
        f"benchmarks/bench_expert_linear.py::{case.format(n)}" for n in ("moe_kernels", "dense GEMM of equal FLOPs")
    ]
    results = tmp_path / "results.json"
    python("-c", SMALL_NETWORKS, "-p", "no:cacheprovider", "--benchmark-enable", f"--benchmark-json={results}", *cases)
    machine, _, _, _, row = python(BENCHMARKS / "ratios.py", results).splitlines()
    what, beside, theirs, ours, ratio, target, verdict = (cell.strip() for cell in row.strip("|").split("|"))
    assert (what, beside) == ("expert_linear 1024 x 64 x 128, 8 experts, fp32", "dense GEMM of equal FLOPs")
    units = {"s": 1, "ms": 1e-3, "us": 1e-6}
    ours_s, theirs_s = (float(digits) * units[unit] for digits, unit in (time.split() for time in (ours, theirs)))
    assert 0.2 < float(ratio) * ours_s / theirs_s < 5
    rows = json.loads(results.read_text())["benchmarks"]
    (exact,) = (row["extra_info"]["ratio"] for row in rows if row["name"] == beside)  # 0.947 is printed as 0.95
    assert ratio == f"{exact:.2f}" and target == ">= 0.95" and verdict == ("met" if exact >= 0.95 else "missed")
    assert "1 threads" in machine


@pytest.mark.parametrize(
    "value, target, expected",
    [
        *((1.3, ">= 1.3", "met"), (1.29, ">= 1.3", "missed"), (1.31, ">= 1.3", "met")),
        *((0.05, "< 0.05", "missed"), (0.04, "< 0.05", "met"), (0.06, "< 0.05", "missed")),
        *((2.4, "<= 2.4", "met"), (2.41, "<= 2.4", "missed"), (2.3, "<= 2.4", "met"), (1, "", "")),
    ],
)
def test_a_verdict_follows_from_value_and_target(value: float, target: str, expected: str) -> None:
    from ratios import verdict

    assert verdict(value, target) == expected


def test_table() -> None:
    from ratios import table

    def row(group: str, name: str, median: float, **info: Any) -> dict[str, Any]:
        return {"group": group, "name": name, "stats": {"median": median}, "extra_info": {"calls": 10, **info}}

    targets = {"a loop": ">= 3", "a library": ">= 2"}
    rows = [
        row("fast", "moe_kernels", 0.5, targets=targets),
        row("fast", "a loop", 0.8, targets=targets, ratio=2.5, ours=0.4),
        row("fast", "a GEMM", 0.2, targets=targets, ratio=0.4, ours=0.5),
        row("not ours", "a loop", 1, targets={}),
    ]
    machine = {"machine": "x86_64", "threads": 2, "bf16": False, "huge_pages": True, "torch": "2.13"}
    lines = table({"benchmarks": rows, "machine_info": machine | {"kernels": "AVX2"}}).splitlines()
    assert lines[0] == "x86_64, kernels AVX2, 2 threads, bf16 emulated, torch 2.13, huge pages on."
    assert lines[4:] == [
        "| fast | a loop | 80 ms | 40 ms | 2.50 | >= 3 | missed |",
        "| fast | a GEMM | 20 ms | 50 ms | 0.40 |  |  |",
        "| fast | a library | not run | | | >= 2 | |",
    ]


def test_times_are_readable() -> None:
    from ratios import readable

    assert list(map(readable, (10.6, 1.064e4, 3.934e-3, 2.5e-5))) == ["10.6 s", "10600 s", "3.93 ms", "25 us"]


@pytest.mark.parametrize("name", ["grouped_mm_layer", "masked_loop_layer"])
def test_layers_agree(name: str) -> None:
    import peers

    moe, s = RobustMoE(16, 32, num_experts=4, top_k=2), Source(torch.float32)
    x, grad = s.randn(24, 16).requires_grad_(), s.randn(24, 16)
    inputs = [x, *moe.parameters()]
    found, expected = getattr(peers, name)(moe, x), moe(x)
    gradients = (torch.autograd.grad(y, inputs, grad) for y in (found, expected))
    for a, b in zip((found, *next(gradients)), (expected, *next(gradients)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_images_agree() -> None:
    """Whole networks agree on images one at a time and all at once."""
    from peers import OneImageAtATime

    experts, s = ExpertResNet18(3, width=4).eval(), Source(torch.float32)
    router = nn.Sequential(nn.Flatten(), nn.LayerNorm(3 * 32 * 32), nn.Linear(3 * 32 * 32, 3))
    moe, x = RobustMoE.from_experts(experts, router, gate="hard"), s.rand(6, 3, 32, 32)
    assert moe.route(x, top_k=1).experts.unique().numel() > 1
    torch.testing.assert_close(OneImageAtATime.of(experts, router)(x), moe(x), rtol=1e-4, atol=1e-5)


def test_tuned_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every constant is where the table says; the values of one are compiled, agree and are timed."""
    import tuned_constants

    assert all(t.value() not in t.others for t in tuned_constants.table())
    monkeypatch.setattr(tuned_constants, "BUILD", tmp_path)
    monkeypatch.setattr(tuned_constants, "FLAGS", ["-O1", *tuned_constants.FLAGS[1:]])
    monkeypatch.setattr(tuned_constants, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["tuned_constants.py", "--match", "kl_divergence"])
    tuned_constants.main()
    row = capsys.readouterr().out.splitlines()[-1]
    figures = r"[\d.e-]+ \| [\d.]+ \| 512: .*, 32768: .*"
    assert re.fullmatch(rf"\| `kGrain` \| cpu/kl_divergence.cpp \| 256 x 100 \| 1 << 12 \| {figures} \|", row)
    assert len(list(tmp_path.glob("*.so"))) == 3


def test_saved_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import saved_bytes

    monkeypatch.setattr(rules, "MIN_ELEMENTS", 0)
    resnet, vit = partial(ResNet18, width=4), partial(ViT, 32, 8, 32, 2, 2)
    networks = {"met": (resnet, 32, "<= 0.0045 MB"), "missed": (resnet, 32, "<= 0.0043 MB"), "ratio": (vit, 32, ">= 6")}
    monkeypatch.setattr(saved_bytes, "NETWORKS", networks)
    monkeypatch.setattr(saved_bytes, "ExpertResNet18", partial(ExpertResNet18, width=4))
    saved_bytes.attacks()
    saved_bytes.training()
    tables = capsys.readouterr().out.splitlines()
    rows = {tuple(cells[:2]): cells[2:] for cells in ([c.strip() for c in t.strip("|").split("|")] for t in tables)}
    assert rows["met", "fp32"] == ["0.3053", "0.004352", "70.1", "<= 0.0045 MB", "met"]
    assert rows["missed", "bf16"][1:] == ["0.004352", "35.1", "<= 0.0043 MB", "missed"]
    assert rows["ratio", "fp32"][2:] == ["7.4", ">= 6", "met"]
    assert rows["ratio", "bf16"][2:] == ["5.0", ">= 6", "missed"]
    assert rows["recompute='activations'", "0.154"] == ["<= 2.4", "met", "0.09146", "<= 1.25", "met"]


def test_peak_memory_of_a_process() -> None:
    """Every image of eager torch keeps 4.7 MB."""
    arguments = (BENCHMARKS / "peak_memory.py", 16, 1, "PGD on a ResNet-18", "as usually written")
    before, beyond = map(float, python(*arguments, MALLOC_MMAP_THRESHOLD_="65536").split())
    assert 100 < before < 2000 and 16 * 4.7 < beyond < 3 * 16 * 4.7


def test_peaks_have_verdicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import peak_memory

    def measure(batch: int, steps: int, title: str, name: str, **environment: str) -> tuple[float, float]:
        assert (batch, steps) == (128, 10 if title.startswith("PGD") else 2)
        return 500, (900 if not environment else 300 if name.endswith("'all'") else 600)

    monkeypatch.setattr(peak_memory, "measure", measure)
    for target, verdict in ((0.5, "met"), (0.49, "missed")):
        monkeypatch.setattr(peak_memory, "TARGETS", {"moe_kernels, recompute='all'": target})
        peak_memory.main()
        found = capsys.readouterr().out
        assert f"recompute='all' | 500 | 300 | 0.50 | <= {target:.2f} | {verdict} | 900 |" in found
        assert "PGD-10 | as usually written | 500 | 600 | 1.00 | | | 900 |" in found


def test_compiled_attack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import compiled_attack

    small = {"a linear map": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), 2, 2, 2)}
    monkeypatch.setattr(compiled_attack, "CASES", small)
    monkeypatch.setattr(sys, "argv", ["compiled_attack.py", "--repeats", "1"])
    compiled_attack.main()
    line = r"a linear map: [\d.e-]+ s compiled, [\d.e-]+ s not \([\d.]+ x\); first call [\d.]+ s\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_bf16_attack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import bf16_attack

    monkeypatch.setattr(bf16_attack, "MODELS", {"small": {"method": "standard", "width": 4, "epochs": 1}})
    monkeypatch.setattr(bf16_attack, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["bf16_attack.py", "--seeds", "1"])
    bf16_attack.main()
    *_, row, cost = (line.strip("|").split("|") for line in capsys.readouterr().out.splitlines())
    fp32, *others = map(float, row[2:])
    assert 0 <= fp32 <= 100
    assert [float(cell) for cell in cost[3:]] == pytest.approx([other - fp32 for other in others], abs=0.11)
    assert bf16_attack.cost([[50.0, 51.0], [50.0, 53.0]], 1) == "+2.0 +- 1.0"


def test_bf16_gradients_leave_the_logits() -> None:
    from bf16_attack import Bf16Gradients

    net, s = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), Source(torch.float32)
    x, grad = s.randn(5, 8).requires_grad_(), s.randn(5, 4)
    y = Bf16Gradients(net)(x)
    torch.testing.assert_close(y, net(x))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x).float()
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, rounded)))


def test_plot_saved_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plot_saved_bytes

    monkeypatch.setattr(rules, "MIN_ELEMENTS", 0)
    from moe_kernels.testing.saved import saved_bytes

    bars: list[dict[str, Any]] = []
    monkeypatch.setattr(plot_saved_bytes, "ResNet18", partial(ResNet18, width=4))
    monkeypatch.setattr(plot_saved_bytes, "ExpertResNet18", partial(ExpertResNet18, width=4))
    monkeypatch.setattr(plot_saved_bytes, "ViT", partial(ViT, depth=1))
    draw = plot_saved_bytes.draw
    monkeypatch.setattr(plot_saved_bytes, "draw", lambda axes, b, *rest: (bars.append(b), draw(axes, b, *rest)))
    monkeypatch.setattr(sys, "argv", ["plot_saved_bytes.py", str(tmp_path / "bytes.svg")])
    plot_saved_bytes.main()
    assert "<svg" in (tmp_path / "bytes.svg").read_text()
    net, x = ResNet18(width=4), torch.rand(2, 3, 32, 32).requires_grad_()
    assert sum(bars[0]["ResNet-18 in torch"].values()) == saved_bytes(lambda: net(x), apart_from=net) // 2
    assert bars[0]["ResNet-18 in attack_mode"]["one bit for each ReLU"] == 69632 // 16
