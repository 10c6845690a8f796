"""Plain modules: a hand-written GPT that generates, an encoder, a ViT, an MLP; on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tilewright as tw
from e2e.models import CONTEXT, GPT, MLP, VOCAB, Encoder, greedy_without_cache, moved_off_init
from tilewright.errors import CaptureError, UnsupportedError, UsageError

BACKENDS = ("eager", "onnxruntime")
ATOL = 1e-5
PROMPTS = [[(7 * i + n) % VOCAB for i in range(n)] for n in (2, 9, 17)]


def ids_example(length: int = 8) -> torch.Tensor:
    return torch.arange(length)[None]


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    torch.manual_seed(1)
    return moved_off_init(GPT())


@pytest.fixture(scope="module", params=BACKENDS)
def gpt_engine(request: pytest.FixtureRequest, gpt: nn.Module) -> tw.Engine:
    return tw.compile(gpt, (ids_example(),), backend=request.param)


def test_hand_written_gpt_generates_the_modules_tokens(gpt, gpt_engine) -> None:
    count = 32
    params = tw.SamplingParams(max_new_tokens=count, ignore_eos=True)
    found = [completion.token_ids for completion in gpt_engine.generate(PROMPTS, params)]
    assert found == [greedy_without_cache(gpt, prompt, count) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
    counters = gpt_engine.counters
    assert counters.tokens_computed == sum(len(p) + count - 1 for p in PROMPTS)
    assert counters.recomputed_tokens == 0
    assert gpt_engine.report()["aten"] == []


def test_hand_written_gpt_gives_the_modules_logits(gpt, gpt_engine) -> None:
    ids = torch.tensor([PROMPTS[2]])
    torch.testing.assert_close(gpt_engine(ids), gpt(ids).detach(), atol=1e-4, rtol=0)


def test_the_tables_of_a_module_bound_its_context(gpt, gpt_engine) -> None:
    assert gpt_engine.config.max_model_len == CONTEXT
    prompt = [1] * (CONTEXT - 4)
    completion = gpt_engine.generate([prompt], tw.SamplingParams(ignore_eos=True))[0]
    assert len(completion.token_ids) == 4
    assert completion.finish_reason == "length"
    with pytest.raises(UsageError, match=f"at most {CONTEXT - 1} tokens"):
        gpt_engine.generate([[1] * CONTEXT])
    with pytest.raises(UsageError, match=f"at most {CONTEXT}"):
        tw.compile(gpt, (ids_example(),), backend="eager", max_model_len=CONTEXT + 1)


def test_without_a_kv_cache_a_gpt_is_a_plain_module(gpt) -> None:
    engine = tw.compile(gpt, (ids_example(),), backend="eager", kv_cache=None)
    assert not hasattr(engine, "generate")
    torch.testing.assert_close(engine(ids_example()), gpt(ids_example()).detach())


class Tagger(nn.Module):
    """Causal, but its outputs are labels: another set than the ids, so it cannot generate."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(ids))


class Smoother(nn.Module):
    """Mixes tokens outside attention: each sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        return self.head(x + x.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(("module", "why"), [(Tagger, "vocabulary"), (Smoother, "mean")])
def test_what_cannot_generate_stays_a_plain_module_and_the_report_says_why(module, why) -> None:
    module = module().eval()
    engine = tw.compile(module, (ids_example(),), backend="eager")
    torch.testing.assert_close(engine(ids_example()), module(ids_example()).detach())
    assert any(why in note for note in engine.report()["capture"]["notes"])
    with pytest.raises(UnsupportedError, match=why):
        tw.compile(module, (ids_example(),), backend="eager", kv_cache="paged")


def test_a_named_kv_cache_needs_token_ids() -> None:
    with pytest.raises(UnsupportedError, match="option kv_cache"):
        tw.compile(MLP(), (torch.zeros(2, 20),), backend="eager", kv_cache="paged")


@pytest.mark.parametrize("backend", BACKENDS)
def test_mlp(backend: str) -> None:
    module = moved_off_init(MLP())
    x = torch.randn(5, 20)
    engine = tw.compile(module, (x,), backend=backend)
    found, expected = engine(x), module(x)
    assert type(found) is tuple
    torch.testing.assert_close(found[0], expected[0].detach(), atol=ATOL, rtol=0)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(engine(x=x)[0], found[0], atol=0, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_written_encoder(backend: str) -> None:
    module = moved_off_init(Encoder())
    ids, mask = torch.randint(VOCAB, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    engine = tw.compile(module, (ids, mask), backend=backend)
    with torch.no_grad():
        expected = module(ids, mask)
    _agree(engine(ids, mask), expected)
    _agree(engine(ids, mask=mask), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hugging_face_bert(backend: str) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    model = moved_off_init(BertModel(config), std=0.1)
    ids, mask = torch.randint(VOCAB, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    mask[0, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    engine = tw.compile(model, inputs, backend=backend)
    with torch.no_grad():
        _agree(engine(**inputs), dict(model(**inputs)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hugging_face_vit(backend: str) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    model = moved_off_init(ViTModel(config), std=0.1)
    pixels = torch.randn(2, 3, 32, 32)
    engine = tw.compile(model, {"pixel_values": pixels}, backend=backend)
    with torch.no_grad():
        _agree(engine(pixel_values=pixels), dict(model(pixel_values=pixels)))
    assert engine.report()["aten"] == []


def _agree(found: object, expected: dict[str, torch.Tensor]) -> None:
    assert isinstance(found, dict)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dynamic_batch(backend: str) -> None:
    module = moved_off_init(MLP())
    batch = torch.export.Dim("batch", min=1, max=64)
    engine = tw.compile(
        module, (torch.randn(4, 20),), dynamic_shapes=({0: batch},), backend=backend
    )
    for size in (1, 4, 33, 64):
        x = torch.randn(size, 20)
        torch.testing.assert_close(engine(x)[0], module(x)[0].detach(), atol=ATOL, rtol=0)
    with pytest.raises(UsageError, match="from 1 to 64"):
        engine(torch.randn(65, 20))


@pytest.fixture(scope="module")
def mlp_engine() -> tw.Engine:
    return tw.compile(MLP(), (torch.randn(4, 20),), backend="eager")


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(5, 20),), {}, "dimension 0 of 5"),
        ((torch.zeros(5, 20),), {}, "dynamic_shapes"),
        ((torch.zeros(4, 21),), {}, "dimension 1 of 21"),
        ((torch.zeros(4, 20, 1),), {}, "3 dimensions"),
        ((torch.zeros(4, 20, dtype=torch.float64),), {}, "another element type: float64"),
        ((), {}, "structure"),
        ((torch.zeros(4, 20), 1), {}, "structure"),
        (([1.0],), {}, "a tensor, not list"),
        ((torch.zeros(4, 20),), {"y": 1}, "structure"),
    ],
)
def test_other_arguments_than_at_compile_time_are_refused(
    mlp_engine, args, kwargs, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mlp_engine(*args, **kwargs)


def test_results_are_the_users_own() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.table, x + self.table[0]

    engine = tw.compile(Table(), (torch.zeros(4),), backend="eager")
    table, _ = engine(torch.zeros(4))
    table.add_(1)
    again, total = engine(torch.zeros(4))
    assert torch.equal(again, torch.ones(3, 4))
    (total * torch.ones(4, requires_grad=True)).sum().backward()


def test_a_module_that_takes_other_inputs_than_its_examples_is_explained() -> None:
    with pytest.raises(CaptureError, match="example inputs"):
        tw.compile(MLP(), (torch.zeros(4, 21),), backend="eager")
    with pytest.raises(UsageError, match="example_inputs"):
        tw.compile(MLP(), backend="eager")
