"""Compiles a GPT written by hand: Tilewright finds the attention and gives it a KV cache."""

import torch
from torch import Tensor, nn

import tilewright as tw

VOCAB, WIDTH, HEADS, CONTEXT = 96, 64, 4, 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (p.view(batch, length, HEADS, -1).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


torch.manual_seed(0)
model = GPT().eval()
engine = tw.compile(model, (torch.zeros(1, 8, dtype=torch.int64),))  # ids in, logits out

prompt = [1, 2, 3, 4]
completion = engine.generate([prompt], tw.SamplingParams(max_new_tokens=20))[0]
ids = torch.tensor([prompt])
for _ in range(20):  # without a cache: the whole sequence anew for each token
    ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
print("tokens:", completion.token_ids)
print("equal to the module's own:", completion.token_ids == ids[0, 4:].tolist())
print("longest sequence, from the model's tables:", engine.config.max_model_len)
print("tokens through the model:", engine.counters.tokens_computed, "of", sum(range(4, 24)))
