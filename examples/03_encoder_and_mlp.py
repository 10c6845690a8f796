"""Compiles plain modules: an encoder with a padding mask, and an MLP for batches of any size."""

import torch
from torch import Tensor, nn

import tilewright as tw


class Encoder(nn.Module):
    """Sentences → one of three classes, with the hidden states beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(self.tokens(ids), src_key_padding_mask=mask == 0)
        return {"hidden": hidden, "classes": self.head(hidden[:, 0]).softmax(-1)}


torch.manual_seed(0)
encoder = Encoder().eval()
ids, mask = torch.randint(100, (2, 16)), torch.ones(2, 16, dtype=torch.int64)
mask[1, 10:] = 0
engine = tw.compile(encoder, (ids, mask))
with torch.no_grad():
    expected = encoder(ids, mask)
found = engine(ids, mask)  # the structure of the module's own result
for name, tensor in expected.items():
    print(f"encoder {name}: largest difference {(found[name] - tensor).abs().max():.1e}")

mlp = nn.Sequential(nn.Linear(20, 64), nn.SiLU(), nn.Linear(64, 10)).eval()
batch = torch.export.Dim("batch", min=1, max=512)
engine = tw.compile(mlp, (torch.randn(4, 20),), dynamic_shapes=({0: batch},))
for size in (1, 33, 512):
    x = torch.randn(size, 20)
    with torch.no_grad():
        print(f"MLP, batch {size}: largest difference {(engine(x) - mlp(x)).abs().max():.1e}")

try:
    engine(torch.randn(4, 21))
except tw.errors.UsageError as error:
    print("another shape is refused:", error)
