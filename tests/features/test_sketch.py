"""TensorSketch: unbiased, linear, reproducible, and closer with more numbers."""

import numpy as np
import pytest
import torch

from foretune.features.sketch import TensorSketch

VOCABULARY, HIDDEN = 40, 20


def outer_products(seed, count=3):
    """Rows, states and owners of two groups, and the matrices Σ r hᵀ that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    rows, states = torch.randn(count, VOCABULARY, generator=generator), torch.randn(count, HIDDEN, generator=generator)
    owner = torch.tensor([0, 1, 1][:count])
    matrices = torch.zeros(2, VOCABULARY, HIDDEN)
    for row, state, group in zip(rows, states, owner.tolist(), strict=True):
        matrices[group] += torch.outer(row, state)
    return rows, states, owner, matrices


def sketched(sketch, rows, states, owner):
    return products(sketch, rows, states, owner, 2)


def products(sketch, rows, states, owner, count):
    spectra = sketch.spectra(count)
    sketch.add_products(spectra, count_sketch(sketch, rows), states, owner)
    return sketch.of_spectra(spectra)


def count_sketch(sketch, rows):
    return sketch.rows(rows[:, sketch.order])


def errors(dim, seeds):
    rows, states, owner, matrices = outer_products(0)
    exact = torch.einsum("ivh,jvh->ij", matrices, matrices)
    found = []
    for seed in range(seeds):
        short = sketched(TensorSketch(VOCABULARY, HIDDEN, dim=dim, seed=seed), rows, states, owner)
        found.append((short @ short.T - exact).numpy())
    return np.stack(found)


def test_inner_products_are_unbiased_over_seeds():
    found = errors(16, 800)
    spread = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0)) < 4 * spread).all()


def test_the_error_shrinks_with_the_root_of_the_length():
    small, large = (np.sqrt((errors(dim, 300) ** 2).mean()) for dim in (16, 256))
    assert small / large == pytest.approx(4, rel=0.15)


def test_the_error_is_what_the_docstring_promises():
    dim, (_, _, _, matrices) = 256, outer_products(0)
    norms = matrices.flatten(1).norm(dim=1).numpy()
    spread = np.sqrt((errors(dim, 1000) ** 2).mean(0)) / np.outer(norms, norms)
    # a matrix of rank one with itself is the worst case
    assert np.sqrt(2 / dim) < spread[0, 0] < np.sqrt(6 / dim)
    assert spread.max() == spread[0, 0]


def test_the_sketch_is_linear_in_the_matrix():
    sketch = TensorSketch(VOCABULARY, HIDDEN, dim=32)
    rows, states, _, _ = outer_products(1)
    parts = products(sketch, rows, states, torch.arange(3), 3)
    together = products(sketch, rows, states, torch.zeros(3, dtype=torch.long), 1)
    torch.testing.assert_close(parts.sum(0), together[0], atol=1e-5, rtol=1e-5)
    scaled = products(sketch, -2.5 * rows, states, torch.arange(3), 3)
    torch.testing.assert_close(scaled, -2.5 * parts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        count_sketch(sketch, rows[:1] + rows[1:2]), count_sketch(sketch, rows[:1]) + count_sketch(sketch, rows[1:2])
    )


def test_a_group_without_members_is_zero():
    sketch = TensorSketch(VOCABULARY, HIDDEN, dim=8)
    rows, states, _, _ = outer_products(2)
    found = products(sketch, rows, states, torch.tensor([0, 0, 2]), 4)
    assert not found[1].any() and not found[3].any() and found[2].any()


def test_products_may_be_added_some_at_a_time():
    sketch = TensorSketch(VOCABULARY, HIDDEN, dim=16, seed=5)
    rows, states, owner, _ = outer_products(4)
    spectra = sketch.spectra(2)
    for chunk in (slice(0, 2), slice(2, 3)):
        sketch.add_products(spectra, count_sketch(sketch, rows[chunk]), states[chunk], owner[chunk])
    torch.testing.assert_close(sketch.of_spectra(spectra), sketched(sketch, rows, states, owner))


def test_one_seed_gives_one_sketch_whatever_was_drawn_before():
    rows, states, owner, _ = outer_products(3)
    first = sketched(TensorSketch(VOCABULARY, HIDDEN, dim=64, seed=1), rows, states, owner)
    torch.manual_seed(123)
    torch.rand(7)
    state = torch.random.get_rng_state()
    again = sketched(TensorSketch(VOCABULARY, HIDDEN, dim=64, seed=1), rows, states, owner)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    other = sketched(TensorSketch(VOCABULARY, HIDDEN, dim=64, seed=2), rows, states, owner)
    assert not torch.allclose(first, other)
