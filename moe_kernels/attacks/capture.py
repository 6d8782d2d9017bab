"""Repeats a step whose tensors stay in place, on a GPU as one recorded CUDA graph."""

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
_failed: list[torch.cuda.CUDAGraph] = []  # torch 2.11's allocator of pinned memory goes on asking them


class _NotRecordableError(Exception):
    """Why a step has to be called every time."""


def repeat(step: Callable[[], None], times: int, device: torch.device | None) -> None:
    """Calls `step` so many times; given a CUDA device, its third call is recorded there and replayed for all others.

    The first call lets libraries choose their algorithms and compiles kernels, and the second is like all later ones.
    Where it makes the host wait for the device, or draws random numbers on the host, which a recording would repeat,
    nothing is recorded. Then, and where the recording fails, every step is called, and a warning says why.
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
    """Calls the step as far as the host has to wait for the device in it; restores torch's generator if it does."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state, mode = generator.get_state(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
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
        # Of this thread alone: another may pin memory or load a module meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                step()
            except BaseException as error:
                fault = error
                raise
    except BaseException as error:  # the end of the recording may have failed for the step's fault
        fault = fault or error
        _clean_up(graph, pool, stream)
        if not isinstance(fault, RuntimeError):
            raise fault from None
        raise _NotRecordableError(f"the recording failed in {_place(fault)}: {fault}") from fault
    return graph


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """After a recording that failed: up to torch 2.11, the allocator and the generator take it to go on for ever."""
    with suppress(RuntimeError):  # that the allocator has been told
        release_graph_pool(pool)
        _failed.append(graph)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")  # a recording that ends, and with it the generator's


def _host_randomness() -> bytes:
    """The states of the generators that a model may draw from on the host."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.default_generator.get_state().numpy()))


def _place(error: BaseException) -> str:
    """The innermost line of the error's traceback in the model, or else, in its backward, of an attack."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not f.filename.startswith(TORCH)] or frames
    frame = ([f for f in ours if not f.filename.startswith(ATTACKS)] or ours)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"
