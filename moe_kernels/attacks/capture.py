"""Repeats a step whose tensors stay in place, on a GPU as one recorded CUDA graph."""

from collections.abc import Callable

import torch


def repeat(step: Callable[[], None], times: int, *, capture: bool) -> None:
    """Calls `step` so many times; with `capture` twice, of which the second is recorded and then replayed.

    The first call, on the stream that records, lets libraries choose their algorithms and allocate their workspaces. A
    step that cannot be recorded, because the host waits for the device in it, is called every time.
    """
    if not capture or times < 3:
        for _ in range(times):
            step()
        return
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
        run = graph.replay
    except RuntimeError:  # the recording ran nothing
        run = step
    for _ in range(times - 1):
        run()
