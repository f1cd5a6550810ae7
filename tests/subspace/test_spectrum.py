from __future__ import annotations

import pytest
import torch
from support.subspace_support import entropy_rank_by_loop, matrix
from torch import Tensor

from realign.errors import NonFiniteError
from realign.subspace.eigen import eigenpairs, eigenpairs_batch
from realign.subspace.entropy import entropy_rank, total_entropy
from realign.subspace.projector import fix_signs
from realign.subspace.spectrum import (
    decompose,
    decompose_batch,
    gram,
    gram_batch,
    numerical_rank,
    spectrum,
    symmetric_spectrum,
    top_triplets,
)

SHAPES = [(6, 6), (5, 9), (9, 5), (1, 7), (7, 1), (40, 17)]


def mixed(index: int, dtype: torch.dtype) -> Tensor:
    """A matrix of one of many characters: tails, gaps, noise, low rank, outliers, tall and wide."""
    d_out, d_in = [(24, 24), (16, 48), (48, 16), (33, 20)][index % 4]
    n = min(d_out, d_in)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    sigma = [
        i**-0.25,
        i**-1.0,
        i**-2.0,
        torch.exp(-i / 3),
        torch.where(i <= 4, 10.0, 0.1),
        1 + 0.01 * i.flip(0),
    ][index // 4 % 6]
    u, _ = torch.linalg.qr(matrix(d_out, n, seed=index))
    v, _ = torch.linalg.qr(matrix(d_in, n, seed=index + 500))
    m = (u * sigma) @ v.T
    if index % 5 == 0:
        m[0] *= 30
    return (m * 0.02).to(dtype)


@pytest.mark.parametrize("eta", [0.5, 0.8, 0.85, 0.9, 0.95])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rank_is_that_of_a_float64_svd_on_96_mixed_matrices(eta: float, dtype: torch.dtype) -> None:
    for index in range(96):
        m = mixed(index, dtype)
        sigma = torch.linalg.svdvals(m.double())
        energies = spectrum(m).energies
        expected = entropy_rank_by_loop(sigma.square().tolist(), eta)
        assert entropy_rank(energies, eta) == expected, (index, eta)
        reference = total_entropy(sigma.square())
        assert total_entropy(energies) == pytest.approx(reference, rel=3e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_triplets_are_the_svd(shape: tuple[int, int]) -> None:
    m = matrix(*shape, seed=3)
    found = top_triplets(m)
    n = min(shape)
    assert torch.allclose(found.s, torch.linalg.svdvals(m), rtol=1e-10)
    eye = torch.eye(n, dtype=torch.float64)
    assert torch.allclose(found.u.T @ found.u, eye, atol=1e-12)
    assert torch.allclose(found.v.T @ found.v, eye, atol=1e-12)
    assert torch.allclose((found.u * found.s) @ found.v.T, m, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_side_alone_has_the_same_directions(shape: tuple[int, int]) -> None:
    m = matrix(*shape, seed=4)
    k = min(2, *shape)
    both = top_triplets(m, k)
    left, right = top_triplets(m, k, side="left"), top_triplets(m, k, side="right")
    assert torch.equal(left.u, both.u)
    assert left.v.shape == (shape[1], 0)
    assert torch.equal(right.v, both.v)
    assert right.u.shape == (shape[0], 0)


def test_bases_stay_orthonormal_and_right_far_down_a_steep_spectrum() -> None:
    u, _ = torch.linalg.qr(matrix(30, 6, seed=1))
    v, _ = torch.linalg.qr(matrix(50, 6, seed=2))
    sigma = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], dtype=torch.float64)
    m = (u * sigma) @ v.T
    found = top_triplets(m, 6)
    assert torch.allclose(found.v.T @ found.v, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert float((found.u @ found.u.T - u @ u.T).norm()) < 1e-5
    assert float((found.v @ found.v.T - v @ v.T).norm()) < 1e-5
    assert bool((found.v * v).sum(0).abs().min() > 1 - 1e-6)


def test_rounding_tail_is_zero_so_that_exact_low_rank_is_seen() -> None:
    m = matrix(40, 3, seed=5) @ matrix(3, 30, seed=6)
    energies = spectrum(m).energies
    assert numerical_rank(energies) == 3
    assert bool((energies[3:] == 0).all())
    assert numerical_rank(spectrum(torch.zeros(4, 6)).energies) == 0


def test_gram_is_the_smaller_one_and_blocks_do_not_matter() -> None:
    wide = matrix(3, 5000, seed=7)
    assert torch.allclose(gram(wide), wide @ wide.T, rtol=1e-12)
    assert torch.allclose(gram(wide.T), wide @ wide.T, rtol=1e-12)


def test_float32_input_is_decomposed_in_float64() -> None:
    m = matrix(20, 20, seed=8).float()
    assert spectrum(m).energies.dtype == torch.float64
    assert torch.allclose(spectrum(m).singular_values, torch.linalg.svdvals(m.double()), rtol=1e-10)


def test_symmetric_spectrum() -> None:
    q, _ = torch.linalg.qr(matrix(4, 4, seed=9))
    c = (q * torch.tensor([4.0, 3.0, 1.0, 0.0], dtype=torch.float64)) @ q.T
    assert symmetric_spectrum(c).energies.tolist() == pytest.approx([4, 3, 1, 0], abs=1e-14)


@pytest.mark.parametrize("shape", [(30, 1100), (1100, 30), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gram_of_views_is_that_of_their_copies(shape: tuple[int, int], dtype: torch.dtype) -> None:
    whole = matrix(shape[0] + 5, 2 * shape[1] + 3, seed=11).to(dtype)
    for view in (whole[2 : shape[0] + 2, 3 : shape[1] + 3], whole[: shape[0], : 2 * shape[1] : 2]):
        m = view.double()
        expected = m @ m.T if shape[0] <= shape[1] else m.T @ m
        assert torch.allclose(gram(view), expected, rtol=1e-12, atol=1e-12)
        expected = expected if shape[0] != shape[1] else m.T @ m
        assert torch.allclose(gram(view.T), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(gram(view), gram(view).T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_refused(bad: float) -> None:
    m = torch.ones(3, 4)
    m[1, 2] = bad
    with pytest.raises(NonFiniteError):
        decompose(m)


def test_fix_signs_makes_the_largest_entry_positive_and_keeps_the_product() -> None:
    found = top_triplets(matrix(6, 4, seed=10))
    u, v = fix_signs(-found.u, -found.v)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.allclose((u * found.s) @ v.T, (found.u * found.s) @ found.v.T)
    again, _ = fix_signs(u, v)
    assert torch.equal(again, u)


@pytest.mark.parametrize("shape", [(4, 9, 5), (3, 5, 1100), (1, 6, 6)])
def test_a_batch_is_its_matrices(shape: tuple[int, int, int]) -> None:
    batch = matrix(*shape, seed=12).float()
    for m, c, found in zip(batch, gram_batch(batch), decompose_batch(batch), strict=True):
        assert torch.allclose(c, gram(m), rtol=1e-12, atol=1e-12)
        expected = decompose(m)
        assert torch.equal(found.energies, expected.energies)
        assert torch.equal(found.left(3), expected.left(3))


def test_the_route_of_accelerators_gives_the_same_spaces() -> None:
    c = gram_batch(matrix(2, 7, 12, seed=13))
    for one, found in zip(c, eigenpairs_batch(c), strict=True):
        expected = eigenpairs(one)
        assert torch.allclose(found.values, expected.values, rtol=1e-12)
        assert torch.allclose(
            found.top(3) @ found.top(3).T, expected.top(3) @ expected.top(3).T, atol=1e-12
        )
