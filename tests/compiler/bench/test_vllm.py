"""vLLM as a contender, by a stub of its offline API; and where it is not installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace as Stub

import pytest
import torch

import tilewright as tw
from cli_running import run
from tilewright.compiler.bench import contenders, throughput
from tilewright.compiler.bench.contenders import absent, make_contender
from tilewright.compiler.bench.entrants import enter
from tilewright.compiler.bench.latency import measure_latency
from tilewright.compiler.bench.machine import Machine
from tilewright.compiler.bench.reference import ReferenceModel
from tilewright.compiler.bench.throughput import measure_throughput
from tilewright.compiler.bench.vllm_contender import options
from tiny_gguf import tiny_hf_model, write_tiny_gguf


class StubEngine:
    """One sequence starts a step, as a small token budget has it; all that run get a token."""

    def __init__(self):
        self.waiting, self.running, self.params = [], {}, []

    def add_request(self, request_id, prompt, params):
        assert isinstance(request_id, str) and {*prompt} == {"prompt_token_ids"}
        self.waiting.append((request_id, params.max_tokens))
        self.params.append(params)

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def step(self):
        if self.waiting:
            name, left = self.waiting.pop(0)
            self.running[name] = left
        outputs = []
        for name in [*self.running]:
            self.running[name] -= 1
            if finished := not self.running[name]:
                del self.running[name]
            tokens = [Stub(token_ids=[7])]
            outputs.append(Stub(request_id=name, outputs=tokens, finished=finished))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    """The options that engines were made with."""
    made = []

    def llm(**given):
        made.append(given)
        return Stub(llm_engine=StubEngine())

    module = Stub(LLM=llm, SamplingParams=Stub)
    kinds = Stub(RequestOutputKind=Stub(DELTA="delta"))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    monkeypatch.setattr(contenders, "absent", lambda name: False)
    monkeypatch.setattr("tilewright.compiler.bench.entrants.absent", lambda name: False)
    monkeypatch.setattr(throughput, "absent", lambda name: False)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "tiny"
    tiny_hf_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    options_ = {"backend": "eager", "verify": "off", "max_model_len": 64, "max_batch_size": 3}
    return tw.compile(str(folder), **options_)


def test_the_same_model_lengths_and_element_type(folder):
    random = ReferenceModel(str(folder), dtype=torch.bfloat16, random_weights=0)
    found = options(random, 96, 4)
    assert found["model"] == str(folder) and found["load_format"] == "dummy"
    assert (found["dtype"], found["max_model_len"], found["max_num_seqs"]) == ("bfloat16", 96, 4)
    assert found["enable_prefix_caching"] is False and "gpu_memory_utilization" not in found
    config = random.config
    head = config.hidden_size // config.num_attention_heads
    held = 4 * 96 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * 2
    assert held < found["kv_cache_memory_bytes"] < 1.2 * held
    assert "load_format" not in options(ReferenceModel(str(folder)), 96, 4)


def test_decoding_is_greedy_past_the_end_and_tokens_are_timed(vllm, folder):
    contender = make_contender("vllm", ReferenceModel(str(folder)), 40, 3)
    found = contender.run_batch([[1, 2], [3, 4], [5, 6]], 6)
    params = contender.engine.params[0]
    assert params.temperature == 0.0 and params.ignore_eos and params.max_tokens == 6
    assert params.output_kind == "delta" and params.detokenize is False
    assert [len(tokens) for tokens in found.token_ids] == [6] * 3
    starts = [stamps[0] for stamps in found.stamps]
    assert starts == sorted(starts) and found.submitted <= starts[0]
    one = contender.run([1, 2], 4)
    assert one.token_ids == [7] * 4 and len(one.itl) == 3
    contender.prepare([[1] * 38])
    assert contender.engine.params[-1].max_tokens == 2  # no more than the context holds


def test_latency_beside_it(vllm, engine, folder):
    found = measure_latency(
        engine,
        lambda: ReferenceModel(str(folder)),
        compare=("vllm",),
        prompt_tokens=8,
        new_tokens=4,
        repeat=1,
    )
    (rival,) = found.rivals
    assert rival.error is None and rival.label == "vLLM, float32" and found.fastest is rival
    assert vllm[0]["max_model_len"] == 12 and vllm[0]["max_num_seqs"] == 1


def test_throughput_makes_one_engine_for_all_batch_sizes(vllm, engine, folder, monkeypatch):
    machine = Machine("cpu", "cpu", 2, 1, 0.0, 1e9, None, None, None, {})
    monkeypatch.setattr(throughput, "probe_machine", lambda target, device: machine)
    found = measure_throughput(
        engine,
        lambda: ReferenceModel(str(folder)),
        batches=(1, 3),
        compare=("vllm",),
        context=8,
        new_tokens=3,
        repeat=1,
    )
    assert len(vllm) == 1 and vllm[0]["max_num_seqs"] == 3
    rivals = [result.rivals[0] for result in found.results]
    assert [rival.error for rival in rivals] == [None, None] and rivals[0].ratio is not None
    # The stub starts one of the three a step, and each ends after 3 + 1 + 1 tokens.
    assert [len(rival.runs[0].steps) for rival in rivals] == [3, 2]


def test_a_gguf_file_is_not_for_it(vllm, tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    entrant = enter("vllm", ReferenceModel(str(tmp_path / "tiny.gguf")), [1, 2], 4)
    assert entrant.run is None and "not on .gguf files" in entrant.error and not entrant.is_absent


@pytest.mark.skipif(not absent("vllm"), reason="vLLM is installed")
def test_where_it_is_not_installed_it_is_left_out_with_a_line(engine, tmp_path, folder):
    engine.save(tmp_path / "engine")
    sizes = ("--compare", "eager,vllm", "--new-tokens", 3, "--repeat", 1)
    lengths = {"latency": ("--prompt-tokens", 8), "throughput": ("--context", 8, "--batch", 2)}
    for verb, length in lengths.items():
        result = run("bench", verb, tmp_path / "engine", *length, *sizes)
        assert result.exit_code == 0, result.stderr
        assert "vllm: not installed (pip install vllm)" in result.stdout
        assert "eager" in result.stdout
