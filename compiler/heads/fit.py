"""Maps from the keys or values of several heads to one that they share.

Let k_h [D] be head h's vector, B_h what its queries are multiplied by, and k' the shared vector, so
that head h reads B_hᵀ k' in place of k_h. Both methods make k' a combination of the k_h.

- "mean": B_h is orthogonal, k' the mean of B_h k_h; the B_h minimise the sum of |B_h k_h - k'|²
  (orthogonal Procrustes, each head in turn against the mean of all).
- "svd": k' and B_h minimise the sum of E|W_h^½ (k_h - B_hᵀ k')|²: a truncated singular value
  decomposition (Eckart and Young) of the weighted heads below each other. W_h is E[q qᵀ] for keys
  and OᵀO for values, so this is the error of scores, were queries independent of keys, and that of
  the output, were tokens attended to alone.

A rotary embedding turns columns by pairs: what commutes with it multiplies each pair, read as one
complex number, by a complex number. There B_h is diagonal and complex, of modulus 1 for "mean"; and
the decomposition is one of rank 1 for each pair. Columns that are not rotated are one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 25  # of turning heads towards their mean; it converges long before
_FLOOR = 1e-6  # of the mean weight: directions without any are kept from division by zero


@dataclass(frozen=True, slots=True)
class Freedom:
    """What a head may be multiplied by, with the inverse where it is read.

    Attributes:
        pairs: columns that a rotary embedding turns together, by complex numbers.
        rest: columns that any matrix may mix.
        fixed: whether it is nothing at all.
    """

    pairs: tuple[tuple[int, int], ...]
    rest: tuple[int, ...]
    fixed: bool = False

    @staticmethod
    def of(width: int, pairs: tuple[tuple[int, int], ...] = (), fixed: bool = False) -> Freedom:
        """That of heads of ``width`` columns."""
        rotated = {column for pair in pairs for column in pair}
        return Freedom(pairs, tuple(i for i in range(width) if i not in rotated), fixed)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """One vector for n heads of D columns.

    Attributes:
        pool: [D, n, D]: k' is ``pool[:, h] @ k_h``, summed over h.
        turns: [n, D, D]: the B_h.
    """

    pool: Tensor
    turns: Tensor


def weights_within(weights: Tensor, freedom: Freedom) -> Tensor:
    """W [n, D, D] as far as maps of that freedom can tell: rotations see a pair's energy alone."""
    n, width, _ = weights.shape
    if freedom.fixed:
        return torch.eye(width, dtype=weights.dtype).repeat(n, 1, 1)
    result = torch.zeros_like(weights)
    for a, b in freedom.pairs:
        energy = (weights[:, a, a] + weights[:, b, b]) / 2
        result[:, a, a] = result[:, b, b] = energy
    rest = torch.tensor(freedom.rest, dtype=torch.long)
    result[:, rest[:, None], rest] = weights[:, rest[:, None], rest]
    diagonal = result.diagonal(dim1=1, dim2=2)
    floor = diagonal.mean().clamp(min=torch.finfo(result.dtype).tiny) * _FLOOR
    return result + torch.eye(width, dtype=result.dtype) * floor


def roots_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square roots [n, D, D] of positive matrices, and their inverses."""
    values, vectors = torch.linalg.eigh(weights)
    root = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    return (
        (vectors * root[:, None]) @ vectors.mT,
        (vectors / root[:, None]) @ vectors.mT,
    )


def weighted(moments: Tensor, roots: Tensor) -> Tensor:
    """E[z zᵀ] [n, D, n, D] of z_h = roots_h k_h."""
    return torch.einsum("hab,hbjc,jdc->hajd", roots, moments, roots)


def products(moments: Tensor, freedom: Freedom) -> Tensor:
    """E[z conj(z)] of each pair as a complex number, [pairs, n, n]."""
    a, b = (torch.tensor([pair[i] for pair in freedom.pairs], dtype=torch.long) for i in (0, 1))
    each = torch.arange(len(a))

    def part(left: Tensor, right: Tensor) -> Tensor:
        return moments[:, left][:, :, :, right][:, each, :, each]

    return torch.complex(part(a, a) + part(b, b), part(b, a) - part(a, b))


def fit(moments: Tensor, weights: Tensor, freedom: Freedom, method: str, align: bool) -> Shared:
    """The shared vector of n heads.

    Args:
        moments: E[k kᵀ] [n, D, n, D].
        weights: W [n, D, D], as ``weights_within`` gives them.
        freedom: of the heads; fixed ones have their plain mean.
        method: "svd" or "mean".
        align: whether "mean" turns heads.
    """
    n, width = moments.shape[:2]
    if freedom.fixed or (method == "mean" and not align):
        turns = torch.eye(width, dtype=moments.dtype).repeat(n, 1, 1)
        return Shared(turns.permute(1, 0, 2) / n, turns)
    if method == "mean":
        turns = _aligned(moments, freedom)
        return Shared(turns.permute(1, 0, 2) / n, turns)
    roots, inverses = roots_of(weights)
    basis = _basis(weighted(moments, roots), freedom)
    turns, pool = basis @ inverses, (basis @ roots).permute(1, 0, 2)
    return _even(Shared(pool, turns), freedom)


def _aligned(moments: Tensor, freedom: Freedom) -> Tensor:
    """Orthogonal maps [n, D, D], each head towards the mean of all."""
    n, width = moments.shape[:2]
    turns = torch.zeros(n, width, width, dtype=moments.dtype)
    if freedom.pairs:
        found = products(moments, freedom)
        factors = _phase(found[:, 0])  # towards the first head
        for _ in range(ROUNDS):
            factors = _phase(torch.einsum("pj,pjh->ph", factors, found))
        _enter_complex(turns, factors, freedom)
    if freedom.rest:
        rest = torch.tensor(freedom.rest)
        own = moments[:, rest][:, :, :, rest]
        maps = _polar(own[0].permute(1, 0, 2))
        for _ in range(ROUNDS):
            maps = _polar(torch.einsum("jab,jbhc->hac", maps, own))
        turns[:, rest[:, None], rest] = maps
    return turns


def _phase(value: Tensor) -> Tensor:
    size = value.abs()
    return torch.where(size > 0, value / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0 + 0j)


def _polar(cross: Tensor) -> Tensor:
    """The orthogonal B [n, m, m] that bring B k nearest to r, from E[r kᵀ]."""
    left, _, right = torch.linalg.svd(cross)
    turns: Tensor = left @ right
    return turns


def _basis(moments: Tensor, freedom: Freedom) -> Tensor:
    """A_hᵀ [n, D, D]: z' = Σ A_hᵀ z_h are the coordinates of all z_h in the space that holds most
    of them, and A_h z' what it holds of z_h.
    """
    n, width = moments.shape[:2]
    basis = torch.zeros(n, width, width, dtype=moments.dtype)
    if freedom.pairs:
        top = torch.linalg.eigh(products(moments, freedom)).eigenvectors[..., -1]  # [pairs, n]
        top = top * _phase(top.sum(-1, keepdim=True)).conj()
        _enter_complex(basis, top.conj(), freedom)
    if freedom.rest:
        rest = torch.tensor(freedom.rest)
        count = len(rest)
        own = moments[:, rest][:, :, :, rest].reshape(n * count, n * count)
        top = torch.linalg.eigh(own).eigenvectors[:, -count:]
        basis[:, rest[:, None], rest] = top.view(n, count, count).mT
    return basis


def _enter_complex(maps: Tensor, factors: Tensor, freedom: Freedom) -> None:
    """Writes the products by ``factors`` [pairs, n] into maps [n, D, D]."""
    a, b = (torch.tensor([pair[i] for pair in freedom.pairs]) for i in (0, 1))
    maps[:, a, a] = maps[:, b, b] = factors.real.T.to(maps.dtype)
    maps[:, b, a] = factors.imag.T.to(maps.dtype)
    maps[:, a, b] = -factors.imag.T.to(maps.dtype)


def _even(shared: Shared, freedom: Freedom) -> Shared:
    """The same with turns of norm 1 on average, so that k' is as large as the k_h are."""
    scale = torch.ones(shared.turns.shape[-1], dtype=shared.turns.dtype)
    for columns in (*freedom.pairs, freedom.rest):
        if columns:
            index = torch.tensor(columns)
            norm = shared.turns[:, index].square().sum((1, 2)).mean() / len(index)
            scale[index] = norm.sqrt()
    return Shared(shared.pool * scale[:, None, None], shared.turns / scale[:, None])


def lost(moments: Tensor, weights: Tensor, shared: Shared) -> tuple[float, float]:
    """Sums over heads of E|W_h^½ (k_h - B_hᵀ k')|², and of E|W_h^½ k_h|²."""
    n, width = moments.shape[:2]
    flat = moments.reshape(n * width, n * width)
    stand = torch.einsum("hba,bjc->hajc", shared.turns, shared.pool).reshape(n * width, -1)
    error = torch.eye(n * width, dtype=flat.dtype) - stand
    left = (error @ flat @ error.T).view(n, width, n, width)
    each = torch.arange(n)
    costs = ((weights * x[each, :, each]).sum().item() for x in (left, moments))
    loss, whole = costs
    return max(loss, 0.0), whole
