"""Gives a model fewer KV heads, and trains its attention a little to recover what that lost.

    python examples/uptrain_gqa.py MODEL --groups 1 --text corpus.txt --steps 30 -o FOLDER

MODEL is a Hugging Face folder or a .gguf file; the text's last tenth is measured on, the rest is
trained on. The model before is the teacher: its distribution of each next token is what the
converted model learns (Hinton et al., 1503.02531). FOLDER is then a model for `tilewright compile`.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.compiler.convert_heads import converted_model
from tilewright.compiler.sources import open_source, source_tokenizer


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--groups", type=int, default=1, help="KV heads that are left")
    parser.add_argument("--method", choices=("svd", "mean"), help="by default svd")
    parser.add_argument("--text", type=Path, required=True, help="to train and measure on")
    parser.add_argument("--tokens", type=int, default=4096, help="that heads are fitted to")
    parser.add_argument("--measure", type=int, default=4096, help="tokens to measure on, at most")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW, at its highest")
    parser.add_argument("--output", "-o", type=Path, help="folder to write, a new one")
    return parser.parse_args(argv)


def next_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """Log probabilities [B, S, V] of what follows each of ids [B, S]."""
    return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def perplexity(model: nn.Module, ids: Sequence[int], length: int) -> float:
    """Of a text cut into windows, each of which begins without a context."""
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    lost = 0.0
    with torch.no_grad():
        for window in windows:
            found = next_tokens(model, window[None, :-1])[0]
            lost -= found.gather(1, window[1:, None]).mean().item()
    return math.exp(lost / len(windows))


def uptrain(model: nn.Module, teacher: nn.Module, ids: Tensor, args: argparse.Namespace) -> None:
    """AdamW on the projections of attention, towards the teacher's next tokens."""
    learned = [p for name, p in model.named_parameters() if "attn" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=args.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps)
    generator, started = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(args.steps):
        starts = torch.randint(len(ids) - args.length, (args.batch,), generator=generator)
        batch = torch.stack([ids[start : start + args.length] for start in starts.tolist()])
        with torch.no_grad():
            wanted = next_tokens(teacher, batch)
        found = next_tokens(model, batch)
        loss = nn.functional.kl_div(
            found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        seconds = time.perf_counter() - started
        print(f"step {step + 1}/{args.steps}: KL {loss.item():.3f}, {seconds:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, measures, trains, measures again, saves."""
    args = arguments(argv)
    source = open_source(args.model)
    tokenizer = source_tokenizer(source)
    assert tokenizer is not None and source.config is not None
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    cut = len(ids) * 9 // 10
    held_out = ids[cut : cut + args.measure]
    # As many heads as there are: the model as it is.
    teacher, _ = converted_model(args.model, tw.GQA(source.config.num_key_value_heads, tokens=0))
    before = perplexity(teacher, held_out, args.length)
    model, facts = converted_model(args.model, tw.GQA(args.groups, args.method, tokens=args.tokens))
    after = perplexity(model, held_out, args.length)
    print(f"KV heads {facts['kv_heads_before']} -> {facts['kv_heads']}, by {facts['method']}")
    print(f"perplexity {before:.2f} before, {after:.2f} converted", flush=True)
    uptrain(model, teacher, torch.tensor(ids[:cut]), args)
    model.eval()
    print(f"perplexity {perplexity(model, held_out, args.length):.2f} uptrained")
    if args.output is not None:
        model.save_pretrained(args.output)
        print(f"written: {args.output}")


if __name__ == "__main__":
    main()
