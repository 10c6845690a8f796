"""What kernel benchmarks share: times of calls in a CUDA graph, the memory's read rate, lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

REPLAYS = 7


def seconds_of(run: Callable[[int], object], calls: int) -> float:
    """Median time of a call, of ``calls`` in one graph; each is given its number."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            run(index)
    times = []
    for _ in range(REPLAYS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3 / calls)
    return statistics.median(times[1:])


def read_rate() -> float:
    """Bytes a second that a plain sum of 1 GiB reads."""
    data = torch.ones(1 << 29, dtype=torch.bfloat16, device="cuda")
    pieces = [data, data.clone()]
    return data.nbytes / seconds_of(lambda index: pieces[index % 2].sum(), 4)


def report(record: Mapping[str, Any], text: str, output: Path | None) -> None:
    """Prints the text, and appends the record as a line of JSON."""
    print(text, flush=True)
    if output is not None:
        line = {"device": torch.cuda.get_device_name(), **record}
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
