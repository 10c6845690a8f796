"""vLLM under the loads of serving_loads.py, an 8B shape with dummy weights: the peer's figures.

    python benchmarks/gpu/vllm_serving.py CONFIG_FOLDER --out FILE [--rates 8,14] [--budget 8192]

Needs vLLM. Its engine core runs in its own process, as it does when it serves; requests are added
when they are due, and count from then; a token's time is when its step's outputs are received.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

CACHE = "/tmp/vllm_serving_cache"
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
    "VLLM_CONFIG_ROOT": f"{CACHE}/config",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
    "TRITON_CACHE_DIR": f"{CACHE}/triton",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def main() -> None:
    """Starts vLLM, runs the loads, writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", default="")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--quantization", default=None)
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from serving_loads import Load, chosen, line, summary

    started = time.perf_counter()
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model=str(options.config),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=1280,
        max_num_seqs=128,
        max_num_batched_tokens=options.budget,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=True,
        disable_log_stats=True,
        quantization=options.quantization,
        attention_config={"backend": "FLASH_ATTN"},
        seed=0,
    )
    engine = llm.llm_engine
    print(f"vLLM {vllm.__version__} ready in {time.perf_counter() - started:.0f} s", flush=True)
    vocab = json.loads((options.config / "config.json").read_text())["vocab_size"]

    def run(load: Load) -> dict[str, float | str]:
        talks, arrivals = load.draw(vocab)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=128,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times: dict[str, list[float]] = {}
        due = sorted(zip(arrivals, range(len(talks)), strict=True))
        start = time.perf_counter()
        sent = 0
        while sent < len(due) or engine.has_unfinished_requests():
            while sent < len(due) and start + due[sent][0] <= time.perf_counter():
                at, which = due[sent]
                name = f"{load.name}-{load.seed}-{which}"
                times[name] = [start + at]
                engine.add_request(name, {"prompt_token_ids": talks[which][0].tokens}, params)
                sent += 1
            if engine.has_unfinished_requests():
                outputs = engine.step()
                now = time.perf_counter()
                for one in outputs:
                    times[one.request_id] += [now] * len(one.outputs[0].token_ids)
        end = max(one[-1] for one in times.values())
        gaps = [b - a for one in times.values() for a, b in zip(one[1:], one[2:], strict=False)]
        first = [one[1] - one[0] for one in times.values()]
        tokens = sum(len(one) - 1 for one in times.values())
        return summary(load.name, end - start, tokens, first, gaps)

    found = []
    for load in chosen(options.rates):
        found.append(run(load))
        print(line(found[-1]), flush=True)
        device = torch.cuda.get_device_name()
        data = {"engine": f"vLLM {vllm.__version__}", "device": device, "budget": options.budget}
        options.out.write_text(json.dumps(data | {"loads": found}, indent=1))
    sys.stdout.flush()
    os._exit(0)  # its processes take their time to end


if __name__ == "__main__":
    main()
