"""`build_info` and `python -m moe_kernels` say what was built."""

import subprocess
import sys

import moe_kernels
from moe_kernels import _C, _library


def test_every_operator_has_a_cpu_kernel_and_a_reference() -> None:
    operators = moe_kernels.build_info()["operators"]
    assert set(operators) >= {name for name in moe_kernels.__all__ if name.islower()} - {
        "attack_mode",
        "autotune",
        "build_info",
    }
    for op, by_device in operators.items():
        assert (by_device["cpu"], by_device["reference"]) == ("C++", "torch"), op
        assert hasattr(moe_kernels.reference, op)


def test_cuda_kernels_are_named_where_they_were_built() -> None:
    operators = moe_kernels.build_info()["operators"]
    for op, by_device in operators.items():
        expected = {
            "expert_linear": "Triton",
            "expert_conv2d": "Triton",
            "expert_mlp_output": "composed",
            "winograd_conv2d": "none",
        }.get(op, "CUDA C++" if _C.cuda_operators else "none")
        assert by_device["cuda"] == expected, op


def test_the_command_prints_build_info() -> None:
    text = subprocess.run([sys.executable, "-m", "moe_kernels"], capture_output=True, text=True, check=True).stdout
    assert "pgd_step_" in text and _C.compiler in text and _library.level in text


def test_importing_loads_nothing_before_it_is_used() -> None:
    heavy = ["torch._dynamo", "torch._inductor", "triton", "sympy", "matplotlib", "transformers", "sklearn"]
    script = f"import sys, torch, moe_kernels; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"
