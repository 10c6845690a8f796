"""Engines that other releases of Triton compiled, run on a device beside one compiled there.

    PYTHONPATH=TRITON_3_9:… python benchmarks/gpu/check_releases.py FOLDER --make     # no GPU
    python benchmarks/gpu/check_releases.py FOLDER                                    # an H200

Two small models with random weights, of heads of 64 and of 128, in bfloat16. Each engine's logits
are held against Hugging Face's in float32, for prompts that every cut of attention is met by, and
may be 1.25 times as far off as Hugging Face in bfloat16; and so are its greedy tokens, which its
decode steps choose (one launch too, whose logits nobody asks for): each may be a twentieth of a
deviation below the best one, given the tokens before. Exit code 1 if one is not, or if there are no
engines of another release.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

import tilewright as tw

LENGTHS = (1, 37, 300, 512, 1100, 2500)
VOCAB, NEW_TOKENS = 4096, 48
FARTHER, NEAR = 1.25, 0.05
HEADS = {"heads-64": (8, 2, 64), "heads-128": (4, 1, 128)}
WAYS = {"heads-64": ("kernels", "persistent"), "heads-128": ("kernels",)}
"""Of decode steps; one launch does not take a single KV head."""


def make(folder: Path) -> None:
    """The models, and what the Triton at hand compiles of them."""
    import triton

    for name in HEADS:
        if not (folder / name).exists():
            model_of(name).save_pretrained(folder / name)
        for decode in WAYS[name]:
            engine = compiled(folder / name, decode)
            engine.save(folder / f"{name}-{decode}-{triton.__version__}", weights="reference")


def model_of(name: str) -> torch.nn.Module:
    """A Llama whose logits have a deviation of about one."""
    import transformers

    heads, kv_heads, dim = HEADS[name]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model


def compiled(model: Path, decode: str) -> tw.runtime.engine.CausalLMEngine:
    """An engine of this process' Triton."""
    return tw.compile(
        str(model),
        target="h200",
        dtype="bfloat16",
        max_batch_size=8 if decode == "kernels" else 1,
        max_model_len=8192,
        verify="structure",
        decode=decode,
    )


class Truth:
    """A model in float32, prompts, and its logits of them."""

    def __init__(self, path: Path) -> None:
        import transformers

        def load(dtype: torch.dtype) -> torch.nn.Module:
            found = transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype)
            return found.cuda().eval()

        random = torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(VOCAB, (count,), generator=random) for count in LENGTHS]
        self._model = load(torch.float32)
        self._logits = [self._of(self._model, prompt) for prompt in self.prompts]
        narrow = load(torch.bfloat16)
        self.theirs = self.farthest([self._of(narrow, prompt) for prompt in self.prompts])

    @torch.inference_mode()
    def _of(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(ids[None].cuda()).logits[0].float().cpu()

    def farthest(self, logits: Sequence[torch.Tensor]) -> float:
        """The largest error of the prompts' logits, in their deviations."""
        pairs = zip(logits, self._logits, strict=True)
        return max(float((one.cpu() - truth).abs().max() / truth.std()) for one, truth in pairs)

    def below(self, tokens: Sequence[Sequence[int]]) -> float:
        """How far below the best one a prompt's new token is at worst, in deviations."""
        worst = 0.0
        for prompt, new in zip(self.prompts, map(torch.tensor, tokens), strict=True):
            logits = self._of(self._model, torch.cat([prompt, new]))[len(prompt) - 1 : -1]
            chosen = logits.gather(-1, new[:, None])[:, 0]
            worst = max(worst, float((logits.amax(-1) - chosen).max() / logits.std()))
        return worst


def check(name: str, engine: tw.runtime.engine.CausalLMEngine, truth: Truth) -> bool:
    """Whether an engine is as right as bfloat16 is; says how far off it is."""
    off = truth.farthest([engine(prompt).float() for prompt in truth.prompts])
    params = tw.SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    found = engine.generate([prompt.tolist() for prompt in truth.prompts], params)
    below = truth.below([completion.token_ids for completion in found])
    right = off <= FARTHER * truth.theirs and below <= NEAR
    print(
        f"{name:32s} logits {off:.4f} off (Hugging Face in bfloat16 {truth.theirs:.4f}), "
        f"tokens {below:.4f} below the best: {'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def main() -> int:
    """Makes engines, or checks those that there are."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    options = parser.parse_args()
    if options.make:
        make(options.folder)
        return 0
    import triton

    found: list[bool] = []
    releases: set[str] = set()
    for name in HEADS:
        truth = Truth(options.folder / name)
        others = chain.from_iterable(
            sorted(options.folder.glob(f"{name}-{decode}-*")) for decode in WAYS[name]
        )
        for path in others:
            engine = tw.load(path, checkpoint=options.folder / name)
            assert isinstance(engine, tw.runtime.engine.CausalLMEngine)
            found.append(check(path.name, engine, truth))
            releases.add(path.name.rsplit("-", 1)[1])
        for decode in WAYS[name]:
            here = f"{name}-{decode}, compiled here"
            found.append(check(here, compiled(options.folder / name, decode), truth))
    releases.discard(triton.__version__)
    print(f"other releases than {triton.__version__}: {', '.join(sorted(releases)) or 'none'}")
    return 0 if releases and all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
