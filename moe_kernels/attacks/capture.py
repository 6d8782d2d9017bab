"""Repeats a step whose tensors stay in place; on a GPU, by replaying a CUDA graph of it."""

import pickle
import random
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_kernels._torch import release_graph_pool

TORCH, ATTACKS = str(Path(torch.__file__).parent), str(Path(__file__).parent)
_failed: list[torch.cuda.CUDAGraph] = []  # kept alive, since torch 2.11's allocator of pinned memory still queries them


class _NotRecordableError(Exception):
    """The reason why a step cannot be recorded."""


def repeat(step: Callable[[], None], times: int, device: torch.device | None) -> None:
    """Calls `step` the given number of times; on a CUDA device, records the third call and replays it from then on.

    In the first call libraries choose their algorithms and kernels are compiled; the second is like all later ones. If
    the second makes the host wait for the device, or draws random numbers on the host, which every replay would repeat,
    nothing is recorded. Then, or if the recording fails, every step is called and a warning says why.
    """
    if device is None or times < 4:
        for _ in range(times):
            step()
        return
    with torch.cuda.device(device):
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        run, rest = step, times
        try:
            with torch.cuda.stream(stream):
                step()
                rest -= 1
                drawn = _host_randomness()
                _call_without_waiting(step)
                rest -= 1
                if _host_randomness() != drawn:
                    raise _NotRecordableError("they draw random numbers on the host")
                run = _record(step, stream).replay
        except _NotRecordableError as reason:
            message = f"the steps of the attack run one by one and not as a CUDA graph: {reason}"
            warnings.warn(f"{message}; capture=False does so without a warning", RuntimeWarning, stacklevel=6)
        finally:
            current.wait_stream(stream)
        for _ in range(rest):
            run()


def _call_without_waiting(step: Callable[[], None]) -> None:
    """Calls the step, up to where it makes the host wait for the device; then restores torch's generator and raises."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state, mode = generator.get_state(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "called a synchronizing CUDA operation" not in str(error):
            raise
        generator.set_state(state)
        raise _NotRecordableError(f"the host waits for the device in {_place(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _record(step: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    fault: BaseException | None = None
    try:
        # Errors in this thread only: another may pin memory or load a module meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                step()
            except BaseException as error:
                fault = error
                raise
    except BaseException as error:  # if the step has failed, so may the end of the recording
        fault = fault or error
        _clean_up(graph, pool, stream)
        if not isinstance(fault, RuntimeError):
            raise fault from None
        raise _NotRecordableError(f"the recording failed in {_place(fault)}: {fault}") from fault
    return graph


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Ends a failed recording, which the allocator and the generator of torch up to 2.11 take to be still running."""
    with suppress(RuntimeError):  # raised if the allocator has been told already
        release_graph_pool(pool)
        _failed.append(graph)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")  # the end of this recording resets the generator


def _host_randomness() -> bytes:
    """The states of the generators that a model may draw from on the host."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.default_generator.get_state().numpy()))


def _place(error: BaseException) -> str:
    """The innermost line of the traceback that belongs to the model or, for an error in its backward, to an attack."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not f.filename.startswith(TORCH)] or frames
    frame = ([f for f in ours if not f.filename.startswith(ATTACKS)] or ours)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"
