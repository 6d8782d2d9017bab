"""How a kernel is timed in `make gpu`: its result is checked, then it is timed along with its rivals."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_device import Device
from gpu_report import Report
from roofline import Work

from moe_kernels.testing import as_tuple

MAX_RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Contest:
    """Times kernels on one device into one report; their names start with `prefix`."""

    def __init__(self, device: Device, report: Report, prefix: str = "") -> None:
        self.device, self.report, self.prefix = device, report, prefix

    def __call__(
        self,
        work: Work,
        ours: Callable[[], Any],
        exact: Callable[[], Any] | None = None,
        beside: dict[str, Callable[[], Any]] | None = None,
        budget: int = 100,
    ) -> None:
        """Reports our time with the floor and the rivals' times; nothing if our result is wrong."""
        kernel = self.prefix + work.kernel
        name = f"{kernel}, {work.shape}"
        if exact is not None and not self.report.check(f"right: {name}", lambda: check_result(ours(), exact())):
            return
        for who, function in ({"ours": ours} | (beside or {})).items():
            time = partial(self._time, work, kernel, who, function, budget)
            if not self.report.check(f"time of {who}: {name}", time, "time") and who == "ours":
                return

    def _time(self, work: Work, kernel: str, who: str, function: Callable[[], Any], budget: int) -> None:
        ms = self.device.milliseconds(function, budget)
        if who != "ours":
            self.report.add(kind="beside", kernel=kernel, shape=work.shape, who=who, ms=ms)
            return
        self.report.add(
            kind="speed",
            kernel=kernel,
            shape=work.shape,
            ms=ms,
            floor_ms=work.floor * 1e3,
            tflops=work.flops / ms / 1e9,
            gb_per_s=work.bytes / ms / 1e6,
        )


def check_result(out: Any, exact: Any) -> None:
    for ours, theirs in zip(as_tuple(out), as_tuple(exact), strict=True):
        ours = ours.detach()
        if not theirs.is_floating_point():
            assert torch.equal(ours.long(), theirs.long()), "integers differ"
            continue
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert error <= MAX_RELATIVE_ERROR[ours.dtype], f"wrong by {error:.1e}"
