"""What HTTP adds to the runtime: TTFT of one stream, and the throughput of many, in turns.

    python benchmarks/bench_http.py CONFIG_FOLDER --out FILE [--streams 64] [--rounds 5]

One engine with random weights. In-process: requests are handed to the serving layer's worker,
without HTTP; over HTTP: the same requests to /v1/completions of the same engine, as streams that a
process of its own reads. Prompts are token ids, all new.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

PROMPT, OUTPUT, FIRST = 512, 128, 40  # tokens of each; streams for TTFT


def main() -> None:
    """Measures, or, as the process that reads, asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--client", help="address to ask; used by this script itself")
    options = parser.parse_args()
    if options.client:
        _client(options.client)
    else:
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    import torch

    import tilewright as tw
    from tilewright.runtime.engine import CausalLMEngine

    engine = tw.compile(
        options.config,
        random_weights=0,
        dtype="bfloat16",
        max_model_len=1024,
        max_batch_size=options.streams,
        verify="structure",
    )
    assert isinstance(engine, CausalLMEngine)
    engine.warm_up()
    found: dict[str, dict[str, list[float]]] = {"in-process": {}, "http": {}}
    with _served(engine) as (worker, loop, url), _asker(url) as ask:
        for turn in range(options.rounds + 1):
            for name, figures in found.items():
                load = {"seed": turn, "streams": options.streams, "vocab": 40_000}
                engine.reset_prefix_cache()
                if name == "http":
                    result = ask(load)
                else:
                    result = asyncio.run_coroutine_threadsafe(_load(load, worker), loop).result()
                for key, value in result.items():
                    if turn:  # the first warms up
                        figures.setdefault(key, []).append(value)
    inside, http = found["in-process"], found["http"]
    adds = [b - a for a, b in zip(inside["ttft_ms"], http["ttft_ms"], strict=True)]
    shares = [b / a for a, b in zip(inside["tok_s"], http["tok_s"], strict=True)]
    data = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "streams": options.streams,
        "adds_ttft_ms": statistics.median(adds),
        "throughput_ratio": statistics.median(shares),
        "rounds": found,
    }
    if options.out:
        options.out.write_text(json.dumps(data, indent=1))
    for name, figures in found.items():
        print(name, {key: round(statistics.median(v), 2) for key, v in figures.items()})
    print({key: data[key] for key in ("device", "streams", "adds_ttft_ms", "throughput_ratio")})


@contextmanager
def _served(engine: Any) -> Iterator[Any]:
    """A server of the engine: its worker, its event loop, its address."""
    from tilewright.serving.app import make_app
    from tilewright.serving.server import Server, address, bind
    from tilewright.serving.service import Rules

    bound, listening = bind("127.0.0.1", 0), threading.Event()
    app = make_app(engine, Rules(models=("it",)))
    server = Server(app)
    loops = []
    start = server.startup

    async def startup(sockets: Any = None) -> None:
        await start(sockets)
        loops.append(asyncio.get_running_loop())
        listening.set()

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    server.startup, server.capture_signals = startup, nothing  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    listening.wait(60)
    yield app.state.service.worker, loops[0], address(bound)
    server.should_exit = True
    thread.join(60)


@contextmanager
def _asker(url: str) -> Iterator[Any]:
    """What asks from a process of its own."""
    command = [sys.executable, __file__, "none", "--client", url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(load: dict[str, int]) -> dict[str, float]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(load) + "\n")
        process.stdin.flush()
        answer: dict[str, float] = json.loads(process.stdout.readline())
        return answer

    yield ask
    process.kill()


def _client(url: str) -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(_load(json.loads(line), url))), flush=True)


async def _load(load: dict[str, int], over: Any) -> dict[str, float]:
    """TTFT of streams one by one, and tokens a second of many, over HTTP (an address) or not."""
    rng = np.random.default_rng(load["seed"] + (1000 if isinstance(over, str) else 0))
    stream = _over_http if isinstance(over, str) else _in_process

    def prompt() -> list[int]:
        found: list[int] = rng.integers(1000, load["vocab"], size=PROMPT).tolist()
        return found

    first = []
    for _ in range(FIRST):
        began = time.perf_counter()
        times = await stream(over, prompt(), 1)
        first.append(times[0] - began)
    prompts = [prompt() for _ in range(load["streams"])]
    began = time.perf_counter()
    each = await asyncio.gather(*(stream(over, one, OUTPUT) for one in prompts))
    seconds = max(times[-1] for times in each) - began
    return {
        "ttft_ms": statistics.median(first) * 1e3,
        "tok_s": load["streams"] * OUTPUT / seconds,
        "ttft_of_many_ms": statistics.median(times[0] - began for times in each) * 1e3,
    }


async def _in_process(worker: Any, prompt: list[int], tokens: int) -> list[float]:
    from tilewright.runtime.params import SamplingParams

    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    stream = await worker.submit(prompt, params)
    return [time.perf_counter() async for deltas in stream for _ in deltas]


async def _over_http(url: str, prompt: list[int], tokens: int) -> list[float]:
    where = urlsplit(url)
    body = {"model": "it", "prompt": prompt, "max_tokens": tokens, "stream": True}
    # Greedy, as params are in-process; the API's own default is temperature 1.
    data = json.dumps(body | {"ignore_eos": True, "temperature": 0}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: it\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    times = []
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            times.append(time.perf_counter())
        elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
            raise RuntimeError(f"{line!r}: {await reader.read(500)!r}")
    writer.close()
    return times


if __name__ == "__main__":
    main()
