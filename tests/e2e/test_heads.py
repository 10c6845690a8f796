"""Engines with fewer KV heads, as users have them: against Hugging Face with the same weights."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tilewright as tw
from cli_running import COMPILE, refused, run
from head_layers import KINDS, attention_layer
from tilewright.compiler.calibrate.recipe import plain_graph
from tilewright.compiler.convert_heads import converted_model, export_gqa
from tilewright.compiler.heads.plan import make_heads
from tilewright.compiler.heads.report import heads_report
from tilewright.compiler.hf_model import capture_causal_lm
from tilewright.compiler.lowering import lower
from tilewright.compiler.quality.compare import compare, graph_logits
from tilewright.compiler.sample_model import sample_source
from tilewright.compiler.sources import Source, open_source, source_tokenizer
from tilewright.errors import UnsupportedError, UsageError
from tilewright.formats.weights import Held, Weight
from tiny_models import PROMPTS, greedy, tiny_model

IDS = torch.tensor([3, 50, 7, 111, 9, 120])
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "uptrain_gqa.py"
HELD_OUT = """
The lighthouse keeper counted the ships that passed each evening and wrote their names in a ledger,
with the weather and the hour. In the spring of that year a schooner ran aground on the reef below
the tower, and the crew of nine walked ashore at low tide, carrying the ship's cat, a chest of tea,
and a clock that had stopped. They stayed until June. When the insurance company sent a surveyor, he
found the hull dry and the holds empty, the sails folded in the church, and half the village
drinking tea. Nobody could say where the cargo had gone, but the school had new desks of good oak,
the doctor rode a better horse, and the clock in the tavern kept the time of a port eleven degrees
to the east. The surveyor wrote a short report, stayed for supper, and was given the cat.
"""
OPTIONS = {"backend": "eager", "max_model_len": 64, "max_batch_size": 2}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Two layers of four heads of 16, each with keys and values of its own."""
    return tiny_model("llama_mha")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> tw.Engine:
    """In two groups."""
    return tw.compile(model, attention="gqa:2", verify="full", **OPTIONS)


@pytest.fixture(scope="module")
def pooled(model: PreTrainedModel) -> PreTrainedModel:
    """The same as a model of Hugging Face."""
    return converted_model(model, "gqa:2")[0]


def _attention(model: PreTrainedModel):
    return [layer.self_attn for layer in model.model.layers]


def _with_twins() -> PreTrainedModel:
    """A copy whose heads 0 and 3 have the same keys and values but for turns, like 1 and 2."""
    twins = tiny_model("llama_mha")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in _attention(twins):
            keys, values = (p.weight.view(4, 16, -1) for p in (layer.k_proj, layer.v_proj))
            for source, copy in ((0, 3), (1, 2)):
                half = keys[source].view(2, 8, -1)
                angle = torch.rand(8, 1, generator=generator) * 6
                keys[copy, :8] = half[0] * angle.cos() - half[1] * angle.sin()
                keys[copy, 8:] = half[1] * angle.cos() + half[0] * angle.sin()
                turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
                values[copy] = turn @ values[source]
    return twins


def test_heads_that_are_copies_convert_without_loss():
    twins = _with_twins()
    found, facts = converted_model(twins, tw.GQA(2, "svd"))
    assert [layer["order"] for layer in facts["layers"]] == [[0, 3, 1, 2]] * 2
    assert all(layer["keys_error"] < 1e-3 for layer in facts["layers"])
    with torch.no_grad():
        wanted, logits = twins(IDS[None]).logits, found(IDS[None]).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert found.config.num_key_value_heads == 2


def test_the_plain_mean_is_hugging_faces(model: PreTrainedModel):
    config = tw.GQA(2, "mean", align=False, regroup=False)
    found = tw.compile(model, attention=config, verify="structure", **OPTIONS)
    pooled = AutoModelForCausalLM.from_config(
        type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 2})
    )
    state = dict(model.state_dict())
    for name in [name for name in state if ".k_proj." in name or ".v_proj." in name]:
        state[name] = state[name].view(2, 2, 16, -1).mean(1).reshape(32, -1)
    pooled.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS), pooled(IDS[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_an_engine_says_what_became_of_its_heads(engine: tw.Engine):
    facts = engine.report()["attention"]
    assert isinstance(facts, dict)
    assert (facts["kv_heads_before"], facts["kv_heads"]) == (4, 2)
    # Keys and values of two layers, 16 columns a head, four bytes each.
    assert facts["kv_bytes_per_token_before"] == 2 * 2 * 4 * 16 * 4
    assert facts["kv_bytes_per_token"] == facts["kv_bytes_per_token_before"] // 2
    assert engine.executor.bytes_per_token == facts["kv_bytes_per_token"]
    assert len(facts["layers"]) == 2 and facts["text"] is None and facts["quality"] is None


def test_pages_give_hugging_faces_tokens(engine: tw.Engine, pooled: PreTrainedModel):
    params = tw.SamplingParams(max_new_tokens=8, ignore_eos=True)
    for prompt in PROMPTS:
        assert engine.generate([prompt], params)[0].token_ids == greedy(pooled, prompt, 8)


def test_heads_come_before_codes(model: PreTrainedModel, pooled: PreTrainedModel):
    quantize = tw.QuantConfig("int4", group=32)
    both = tw.compile(model, attention="gqa:2", quantize=quantize, **OPTIONS)
    alone = tw.compile(pooled, quantize=quantize, verify="structure", **OPTIONS)
    torch.testing.assert_close(both(IDS), alone(IDS))
    report = both.report()
    assert report["attention"]["kv_heads"] == 2 and report["quantization"]["scheme"] == "int4"


def test_folders_come_back(model: PreTrainedModel, pooled: PreTrainedModel, tmp_path: Path):
    facts = export_gqa(model, tmp_path / "few", "gqa:2")
    assert facts["kv_heads"] == 2
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "few")
    with torch.no_grad():
        assert torch.equal(stored(IDS[None]).logits, pooled(IDS[None]).logits)
    engine = tw.compile(tmp_path / "few", attention="mqa", verify="structure", **OPTIONS)
    for form in ("embed", "reference"):
        engine.save(tmp_path / form, weights=form)
        assert torch.equal(tw.load(tmp_path / form)(IDS), engine(IDS))
    texts = json.loads((tmp_path / "reference" / "weights.json").read_text())["weights"]
    assert any("map_rows(held(" in text for text in texts.values())
    with pytest.raises(UsageError, match="a new one"):
        export_gqa(model, tmp_path / "few", "gqa:2")


def test_the_shell_converts_measures_and_shows(tiny_gguf: Path, tmp_path: Path):
    options = ("--scheme", "int8-weight", "--attention", "mqa", "--report", "--tokens", 300)
    made = run("quantize", tiny_gguf, "-o", tmp_path / "e", *options, *COMPILE)
    assert made.exit_code == 0, made.output
    assert made.stdout.count("top-1 agreement") == 2 and "keys error" in made.stdout
    assert "1 KV heads, were 2" in run("inspect", tmp_path / "e").stdout
    facts = tw.load(tmp_path / "e").report()["attention"]
    assert isinstance(facts, dict) and facts["text"] == "the package's"
    quality = facts["quality"]
    assert quality["tokens"] == 299 and not quality["held_out"] and quality["kl"] > 0
    wrong = run("compile", tiny_gguf, "-o", tmp_path / "f", "--attention", "gqa", *COMPILE)
    refused(wrong, "'mqa'")
    export = ("--format", "compressed-tensors", "--scheme", "int8", "--attention", "mqa")
    refused(run("quantize", tiny_gguf, "-o", tmp_path / "f", *export), "option --attention")


@pytest.mark.nightly
def test_the_example_uptrains(tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = Path(tw.__path__[0]) / "compiler" / "calibrate" / "text.txt"
    main = runpy.run_path(str(EXAMPLE))["main"]
    sizes = ("--steps", "2", "--batch", "2", "--length", "16")
    main([str(tiny_gguf), "--text", str(text), *sizes, "-o", str(tmp_path / "few")])
    assert "KV heads 2 -> 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "few" / "config.json").read_text())["num_key_value_heads"] == 1


def test_what_cannot_be_is_refused():
    graph, source = attention_layer(KINDS["mha"]), Source("module", "layer", torch.nn.Module(), {})
    with pytest.raises(UsageError, match="one of 1, 2, 4"):
        make_heads(graph, source, tw.GQA(3), 64)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        make_heads(graph, source, tw.GQA(2, calibrate="x.txt"), 64)
    plan = make_heads(graph, source, tw.GQA(2, report=True), 64)
    with pytest.raises(UnsupportedError, match="quality report"):
        heads_report(graph, source, plan, 64)
    with pytest.raises(UnsupportedError, match="num_key_value_heads"):
        converted_model(tiny_model("gpt2"), "mqa")
    with pytest.raises(UsageError, match="a causal LM"):
        converted_model(torch.nn.Linear(2, 2), "mqa")


def test_on_real_weights_least_squares_lose_less_than_the_mean(smollm2_gguf: Path):
    """Two layers of SmolLM2, three KV heads to one, on a text that neither was fitted to."""
    source = sample_source(open_source(smollm2_gguf))
    assert source is not None
    # Read once, not for each run.
    held: dict[Weight, Weight] = {w: Held(w.load(), "read") for w in {*source.weights.values()}}
    weights = {name: held[weight] for name, weight in source.weights.items()}
    graph = lower(capture_causal_lm(source.module), "g", weights)
    ids = source_tokenizer(source).encode(HELD_OUT)[:200]
    base, found = graph_logits(plain_graph(graph)), {}
    for method in ("svd", "mean"):
        plan = make_heads(graph, source, tw.GQA(1, method, tokens=512), 256)
        logits = graph_logits(plain_graph(graph, plan))
        found[method] = compare(base, logits, ids, 200, 100).kl
        errors = torch.tensor(list(plan.errors.values()))
        found[f"{method} errors"] = errors.mean().item()
    assert found["svd"] < found["mean"]
    assert found["svd errors"] < found["mean errors"]
