"""Short vectors whose inner products estimate those of the unembedding gradients.

The gradient of a margin with respect to the unembedding is a sum of outer products r hᵀ (vocabulary × hidden), far too
large to keep a row of. TensorSketch (Pham & Pagh, KDD 2013) maps such a product to `dim` numbers: count sketches of r
and of h, convolved by FFT. Inner products are unbiased; their standard deviation is at most about √(2/dim)·‖φ‖‖φ′‖ for
generic vectors (2 % for 4096), √(6/dim) in the worst case, two products of rank one.

Vocabulary entries are dealt to the buckets like cards: shuffled once, then one to each bucket in turn. Two of them
share a bucket with probability at most 1/dim, as under independent hashes, so the bounds above hold; and with residuals
in the shuffled order a count sketch is a plain sum of blocks.
"""

import torch
from torch import Tensor


class TensorSketch:
    """A fixed random linear map of vocabulary × hidden matrices to `dim` numbers.

    Attributes:
        order: the shuffled vocabulary: token ids, shape (vocabulary,).
        place: where each token is in `order`, shape (vocabulary,).

    Args:
        vocabulary: rows of the matrices.
        hidden: columns of the matrices.
        dim: length of a sketch.
        seed: seed of the hashes; sketches are comparable only under one seed.
    """

    def __init__(self, vocabulary: int, hidden: int, *, dim: int = 4096, seed: int = 0, device: str = "cpu") -> None:
        """Draw hashes and signs from `seed`, always on the CPU so that every device agrees."""
        generator = torch.Generator().manual_seed(seed)
        self.dim = dim
        self._sign = _signs(vocabulary, generator).to(device)
        self._column_sign = _signs(hidden, generator).to(device)
        self._column_bucket = torch.randint(dim, (hidden,), generator=generator).to(device)
        self.order = torch.randperm(vocabulary, generator=generator).to(device)
        self.place = torch.argsort(self.order)

    def rows(self, residuals: Tensor) -> Tensor:
        """Count sketch of vocabulary vectors whose entries are in `order`: (n, vocabulary) → (n, dim)."""
        signed = residuals * self._sign
        whole = signed.shape[1] // self.dim * self.dim
        sketch = signed[:, :whole].unflatten(1, (-1, self.dim)).sum(1)
        sketch[:, : signed.shape[1] - whole] += signed[:, whole:]
        return sketch

    def spectra(self, count: int) -> Tensor:
        """Those of `count` sums of nothing, for `add_products`; complex, shape (count, dim // 2 + 1)."""
        return torch.zeros(count, self.dim // 2 + 1, dtype=torch.complex64, device=self.place.device)

    def add_products(self, spectra: Tensor, row_sketches: Tensor, states: Tensor, owner: Tensor) -> None:
        """Add products r hᵀ to the sums that they belong to, in place: a convolution is a product of spectra.

        Args:
            spectra: of `spectra`.
            row_sketches: count sketches of the r, shape (n, dim).
            states: the h, shape (n, hidden).
            owner: number of each product's sum, shape (n,).
        """
        columns = _count_sketch(states, self._column_sign, self._column_bucket, self.dim)
        spectra.index_add_(0, owner, torch.fft.rfft(row_sketches) * torch.fft.rfft(columns))

    def of_spectra(self, spectra: Tensor) -> Tensor:
        """Sketches of the sums Σ r hᵀ, shape (count, dim)."""
        return torch.fft.irfft(spectra, n=self.dim)


def _signs(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (length,), generator=generator).float() * 2 - 1


def _count_sketch(vectors: Tensor, sign: Tensor, bucket: Tensor, dim: int) -> Tensor:
    return vectors.new_zeros(len(vectors), dim).index_add(1, bucket, vectors * sign)
