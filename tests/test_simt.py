"""The emulation of CUDA blocks computes what a GPU computes, and detects each planted fault."""

import re

import pytest
from simt import build


@pytest.mark.parametrize(
    ("kernel", "expected"), [("everything", [1] * 64), ("neighbour", [*range(2, 65), 1])], ids=lambda p: str(p)[:10]
)
def test_correct_kernels_give_the_right_result(kernel: str, expected: list[int]) -> None:
    done = build.run("self_test", kernel)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == expected


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("race", "depends on the order of blocks and threads"),
        ("order_of_blocks", "depends on the order of blocks and threads"),
        ("unordered_sum", "depends on the order of blocks and threads"),
        ("shared_overflow", "index 64 out of bounds"),
        ("dynamic_overflow", "heap-buffer-overflow"),
        ("global_overflow", "heap-buffer-overflow"),
        ("barrier_after_return", "63 threads wait at the barrier .* 1 have returned"),
        ("two_barriers", "threads wait at different barriers"),
        ("mask_names_returned_lane", "lane 7 of the mask has returned"),
        ("mask_omits_the_caller", "lane 16 calls with a mask 0000ffff that does not name it"),
        ("reads_lane_outside_the_mask", "reads lane 20, which the mask 0000ffff does not name"),
        ("shuffle_meets_barrier", "thread 0 waits at line .* for mask ffffffff"),
    ],
)
def test_planted_faults_are_caught(kernel: str, message: str) -> None:
    done = build.run("self_test", kernel)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


def test_a_library_for_other_gpus_says_so() -> None:
    done = build.run("self_test", "built_for_another_gpu")
    assert re.search("combine: no kernel image.*built for other GPUs.*TORCH_CUDA_ARCH_LIST", done.stderr), done.stderr
