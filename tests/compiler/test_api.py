"""tilewright.compile: options, bad input, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from e2e.models import GPT, MLP, moved_off_init
from tilewright.errors import (
    CheckpointError,
    EngineError,
    TilewrightError,
    UnsupportedError,
    UsageError,
)
from tiny_gguf import tiny_hf_model, write_tiny_gguf

X = torch.zeros(2, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny llama, without a tokenizer."""
    path = tmp_path_factory.mktemp("hf") / "llama"
    tiny_hf_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def folder_copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "lists"),
    [
        ({"target": "h900"}, "h100"),
        ({"target": ""}, "h100"),
        ({"backend": "cuda"}, "auto, eager, onnxruntime"),
        ({"backend": None}, "auto, eager, onnxruntime"),
        ({"kv_cache": "ring"}, "auto, paged, static"),
        ({"kv_cache": 3}, "auto, paged, static"),
        ({"dtype": "int3"}, "auto, float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "auto, float32, bfloat16, float16"),
        ({"verify": "maybe"}, "off, structure, sample, full"),
        ({"max_model_len": 0}, "1 or more"),
        ({"max_model_len": True}, "1 or more"),
        ({"max_model_len": 3.5}, "1 or more"),
        ({"max_batch_size": -1}, "1 or more"),
        ({"max_batch_size": "8"}, "1 or more"),
    ],
)
def test_a_wrong_option_lists_the_valid_ones(options, lists, monkeypatch) -> None:
    monkeypatch.delenv("TILEWRIGHT_VERIFY")
    with pytest.raises(UsageError) as raised:
        tw.compile(MLP(), (X,), **options)
    message = str(raised.value)
    assert all(name in message for name in lists.split(", ")), message


@pytest.mark.quick
@pytest.mark.parametrize("page_size", [0, 257, -1, "16", 2.0, True])
def test_a_wrong_page_size_is_refused(page_size) -> None:
    with pytest.raises(UsageError, match="page_size"):
        tw.KVCacheConfig(page_size=page_size)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["bf16", "", None, 8, "FP8"])
def test_a_wrong_cache_type_lists_the_valid_ones(dtype) -> None:
    with pytest.raises(UsageError, match="auto, fp8, int8"):
        tw.KVCacheConfig(dtype=dtype)


def test_an_engine_for_another_device_is_made_but_does_not_run_here(tmp_path: Path) -> None:
    if tw.Target.detect().arch == tw.Target.parse("h100").arch:
        pytest.skip("this is that device")
    engine = tw.compile(MLP(), (X,), target="h100")
    engine.save(tmp_path / "engine")
    with pytest.raises(EngineError, match="h100"):
        engine(X)
    with pytest.raises(EngineError, match="h100"):
        tw.load(tmp_path / "engine")
    with pytest.raises(UnsupportedError, match="triton, eager, or onnxruntime with CUDA"):
        tw.compile(MLP(), (X,), target="h100", backend="onnxruntime")


def test_pages_need_a_backend_that_has_them() -> None:
    with pytest.raises(UnsupportedError, match="static"):
        tw.compile(MLP(), (X,), backend="onnxruntime", kv_cache="paged")


@pytest.mark.parametrize("model", [None, 3, {"a": 1}, torch.zeros(2)])
def test_what_is_no_model_is_refused(model) -> None:
    with pytest.raises(UsageError, match="nn.Module"):
        tw.compile(model)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing there"):
        tw.compile(tmp_path / "model.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"123")
    with pytest.raises(UsageError, match=r"\.gguf"):
        tw.compile(tmp_path / "weights.bin")


@pytest.mark.parametrize("keep", [0, 3, 200, 20_000])
def test_a_truncated_gguf_is_refused(gguf: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        tw.compile(path)


@pytest.mark.parametrize("keep", [0, 7, 100, 5_000])
def test_truncated_safetensors_are_refused(folder_copy: Path, keep: int) -> None:
    path = folder_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="safetensors"):
        tw.compile(folder_copy)


def test_a_folder_without_a_configuration_is_refused(folder_copy: Path) -> None:
    (folder_copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        tw.compile(folder_copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_configuration_is_refused(folder_copy: Path, content: str) -> None:
    (folder_copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        tw.compile(folder_copy)


def test_a_folder_without_weights_is_refused(folder_copy: Path) -> None:
    (folder_copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        tw.compile(folder_copy)


def test_an_unknown_architecture_is_refused(folder_copy: Path) -> None:
    path = folder_copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "quux", "architectures": ["QuuxLM"]}))
    with pytest.raises(TilewrightError, match="quux"):
        tw.compile(folder_copy)


def test_weights_of_another_configuration_are_refused(folder_copy: Path) -> None:
    path = folder_copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="mlp"):
        tw.compile(folder_copy)


def test_an_unknown_gguf_architecture_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="bert"):
        tw.compile(tmp_path / "bert.gguf")


@pytest.mark.parametrize("examples", [(), (torch.zeros(2, 3), 1), [1.0], "x", 7, ("a", "b", "c")])
def test_wrong_example_inputs_are_refused(examples) -> None:
    with pytest.raises(TilewrightError):
        tw.compile(MLP(), examples, backend="eager")


def test_a_model_whose_tokens_mix_says_where() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids)
            return self.head(x.cumsum(dim=1))

    with pytest.raises(UnsupportedError, match="cumsum.*works along the token axis"):
        tw.compile(Mean(), (torch.zeros(1, 5).long(),), backend="eager", kv_cache="paged")


@pytest.fixture(scope="module")
def engine(gguf: Path) -> tw.Engine:
    return tw.compile(gguf, backend="eager", max_model_len=32)


class TestEngineInput:
    """What a causal LM's engine refuses, and that it goes on working afterwards."""

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ("", "at least one token"),
            ([[]], "at least one token"),
            ([[1] * 32], "at most 31 tokens"),
            ([[1] * 500], "at most 31 tokens"),
            ([[320]], "from 0 to 319"),
            ([[-1]], "from 0 to 319"),
            ([[1.5]], "token ids"),
            ([["a"]], "token ids"),
            ([1, 2, 3], r"generate\(\[\[1, 2, 3\]\]\)"),
            ([None], "token ids"),
            (7, "token ids"),
            (None, "token ids"),
        ],
    )
    def test_a_bad_prompt(self, engine, prompts, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            engine.generate(prompts, tw.SamplingParams(max_new_tokens=2))
        assert engine.generate("the fox", tw.SamplingParams(max_new_tokens=2))

    def test_bad_parameters(self, engine) -> None:
        with pytest.raises(UsageError, match="max_new_tokens"):
            engine.generate("the fox", tw.SamplingParams(max_new_tokens=0))
        with pytest.raises(UsageError, match="SamplingParams"):
            engine.generate("the fox", {"max_new_tokens": 3})
        with pytest.raises(UsageError, match="one SamplingParams for each"):
            engine.generate("the fox", [tw.SamplingParams()] * 2)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.zeros(1, 2), "integers"),
            (torch.zeros(0, dtype=torch.int64), "at least one"),
            (torch.zeros(1, 2, 3, dtype=torch.int64), "integers"),
            (torch.full((1, 4), 320), "from 0 to 319"),
            (torch.full((4,), -1), "from 0 to 319"),
            (torch.ones(33, dtype=torch.int64), "at most 32"),
            ([1, 2], "integers"),
            ("the fox", "integers"),
        ],
    )
    def test_bad_token_ids_for_logits(self, engine, ids, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            engine(ids)

    def test_no_prompts_are_no_completions(self, engine) -> None:
        assert engine.generate([]) == []

    def test_a_bad_conversation(self, engine) -> None:
        with pytest.raises(TilewrightError):
            engine.chat_prompt([{"text": "no role"}])


def test_text_needs_a_tokenizer(folder: Path) -> None:
    engine = tw.compile(folder, backend="eager")
    with pytest.raises(UsageError, match="a tokenizer"):
        engine.generate("the fox")


def test_an_interrupted_compile_can_be_run_again() -> None:
    model = moved_off_init(GPT())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    example = (torch.zeros(1, 8).long(),)
    for at in (0.05, 0.45, 0.9):

        def interrupt(phase: str, share: float, at: float = at) -> None:
            if share >= at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tw.compile(model.train(), example, backend="eager", progress=interrupt)
        assert model.training
    engine = tw.compile(model.eval(), example, backend="eager")
    torch.testing.assert_close(engine(example[0]), model(example[0]).detach())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_progress_tells_the_phases_in_order() -> None:
    heard = []
    tw.compile(MLP(), (X,), backend="eager", progress=lambda phase, share: heard.append(share))
    assert heard == sorted(heard)
    assert heard[0] == 0.0
    assert heard[-1] <= 1.0


def test_a_dtype_casts_a_hugging_face_model(folder: Path) -> None:
    engine = tw.compile(folder, backend="eager", dtype="bfloat16")
    whole = tw.compile(folder, backend="eager").report()
    assert engine.report()["weight_bytes"] <= 0.51 * whole["weight_bytes"]
    assert engine(torch.tensor([1, 2, 3])).dtype == torch.float32
    with pytest.raises(UsageError, match=r"module\.to"):
        tw.compile(MLP(), (X,), backend="eager", dtype="bfloat16")
