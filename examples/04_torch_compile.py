"""Tilewright as a backend of torch.compile: graph breaks, changing batches, new weights."""

import time

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Takes one of two ways by the values that it sees, which breaks the graph there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.easy, self.hard = nn.Linear(64, 8), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.first(x)
        way = self.hard if x.abs().max() > 1 else self.easy
        return way(x), x.shape[0]


torch.manual_seed(0)
model = Router().eval()
compiled = torch.compile(model, backend="tilewright")


def show(title: str, x: Tensor) -> None:
    started = time.perf_counter()
    with torch.no_grad():
        found, size = compiled(x)
        milliseconds = (time.perf_counter() - started) * 1e3
        error = (found - model(x)[0]).abs().max()
    print(f"{title:24} batch {size:3}: error {error:.1e}, {milliseconds:7.1f} ms")


show("compiles", torch.randn(4, 64))
show("runs", torch.randn(4, 64))
show("the other branch", 10 * torch.randn(4, 64))
show("another batch size", torch.randn(7, 64))  # compiled anew, for any size
show("any batch size", torch.randn(100, 64))
with torch.no_grad():
    model.first[0].weight.mul_(1.5)
show("weights were changed", torch.randn(100, 64))

# Under grad the graph runs as torch runs it, with one warning; gradients are right.
compiled(torch.randn(4, 64))[0].sum().backward()
print("gradient of the first layer:", tuple(model.first[0].weight.grad.shape))
