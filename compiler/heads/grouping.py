"""Which heads share: groups of one size, those within a group as near to each other as they can."""

from __future__ import annotations

import torch
from torch import Tensor

from .fit import Freedom, products

SWEEPS = 20


def distances(moments: Tensor, freedom: Freedom, turned: bool) -> Tensor:
    """E|k_a - k_b|² of each two heads [n, n] at the best turn of one of them, as a share of the
    mean E|k|².

    Args:
        moments: E[k kᵀ] [n, D, n, D].
        freedom: of the heads.
        turned: whether they may be turned.
    """
    n, width = moments.shape[:2]
    size = torch.einsum("hahb->h", moments * torch.eye(width, dtype=moments.dtype)[:, None, :])
    if freedom.fixed or not turned:
        near = torch.einsum("hajb,ab->hj", moments, torch.eye(width, dtype=moments.dtype))
    else:
        near = torch.zeros(n, n, dtype=moments.dtype)
        if freedom.pairs:
            near = near + products(moments, freedom).abs().sum(0)
        if freedom.rest:
            rest = torch.tensor(freedom.rest)
            blocks = moments[:, rest][:, :, :, rest].permute(0, 2, 1, 3)
            near = near + torch.linalg.svdvals(blocks).sum(-1)
    found = (size[:, None] + size[None] - 2 * near).clamp(min=0)
    return found / size.mean().clamp(min=torch.finfo(found.dtype).tiny)


def grouped(costs: Tensor, groups: int) -> tuple[int, ...]:
    """The heads in an order in which each n / groups neighbours are a group: pairs of a group cost
    little in sum.

    The better of neighbours as they are, and of nearest heads one after the other, each improved by
    exchanging two heads as long as that helps.

    Args:
        costs: of each two heads to be in one group [n, n], symmetric.
        groups: a divisor of n.
    """
    n = len(costs)
    size = n // groups
    if groups in (1, n):
        return tuple(range(n))
    table = (costs + costs.T).fill_diagonal_(0) / 2
    starts = ([head // size for head in range(n)], _greedy(table, size))
    owners = min((_exchanged(table, start) for start in starts), key=lambda o: _cost(table, o))
    members: dict[int, list[int]] = {}
    for head, owner in enumerate(owners):
        members.setdefault(owner, []).append(head)
    return tuple(head for group in members.values() for head in group)


def _cost(table: Tensor, owners: list[int]) -> float:
    of = torch.tensor(owners)
    # Rounded: what differs by the last bit is a tie, which neighbours win.
    return round(table[of[:, None] == of].sum().item(), 9)


def _greedy(table: Tensor, size: int) -> list[int]:
    n = len(table)
    owners = [-1] * n
    for group in range(n // size):
        left = [head for head in range(n) if owners[head] < 0]
        members = [left.pop(0)]
        while len(members) < size:
            near = table[members].sum(0)
            members.append(left.pop(min(range(len(left)), key=lambda i: near[left[i]].item())))
        for head in members:
            owners[head] = group
    return owners


def _exchanged(table: Tensor, owners: list[int]) -> list[int]:
    """Owners after every exchange of two heads that lowers the cost, the best one first."""
    of, n = torch.tensor(owners), len(owners)
    for _ in range(SWEEPS * n):
        member = torch.nn.functional.one_hot(of).to(table.dtype)
        to_group = table @ member  # [n, groups]: of each head to each group
        own = to_group.gather(1, of[:, None])
        other = to_group[:, of]  # of head i to the group of head j
        gain = own + own.T - other - other.T + 2 * table
        gain[of[:, None] == of] = 0
        best = int(gain.argmax())
        a, b = divmod(best, n)
        if gain[a, b] <= 1e-9:
            break
        of[a], of[b] = of[b].clone(), of[a].clone()
    return of.tolist()
