"""What differs between the releases of torch that we support, in one place."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

EXPORT_KEEPS_AUTOCAST: bool = TorchVersion(torch.__version__) >= "2.13"
"""Whether torch.export writes the casts of the autocast that is active around it into the graph.

Tried with 2.13, which does, and 2.11, which leaves them out without a word.
"""
