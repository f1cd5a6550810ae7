"""The few LAPACK and BLAS routines that torch does not offer, called where the tensors lie.

The library is the one that SciPy brings with it and publishes for other compiled code (the
`__pyx_capi__` tables of `scipy.linalg.cython_blas` and `cython_lapack`). Called through `ctypes`
they work in place on a tensor's memory and let other Python threads run, so that a file is read
while a matrix is decomposed; SciPy's own Python wrappers copy, and hold the interpreter.

Here: the calls, in float64 on the CPU. Not here: what they are called for (`eigen`).

Layout: a row-major tensor is a column-major matrix transposed. Symmetric matrices are therefore
given by their upper triangle (row <= column), which LAPACK sees as the lower one, and a matrix of
column vectors is a tensor whose rows are the vectors.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

Argument: TypeAlias = str | int | float | Tensor


def syrk_upper(c_nn: Tensor, block: Tensor, *, by_rows: bool) -> None:
    """Add block block^T (or block^T block) to the upper triangle of C, at half the flops of both.

    Args:
        c_nn: [n, n] float64, contiguous; the lower triangle is neither read nor written.
        block: float64, contiguous: [n, k], or [k, n] if `by_rows`.
        by_rows: whether the rows of the block, not its columns, are summed over.
    """
    n, k = block.shape[::-1] if by_rows else block.shape
    assert c_nn.shape == (n, n), (tuple(c_nn.shape), tuple(block.shape))
    _check(c_nn, block)
    if n and k:
        trans = "N" if by_rows else "T"
        leading = block.shape[1]
        _call("blas", "dsyrk", "L", trans, n, k, 1.0, block, leading, 1.0, c_nn, n)


def tridiagonalise(c_nn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce a symmetric C = Q T Q^T to tridiagonal form, in place.

    Args:
        c_nn: [n, n] float64, contiguous; only the upper triangle is read. It is overwritten by the
            reflectors whose product is Q.

    Returns:
        The diagonal of T [n], the one beside it [n] (its last entry unused) and the reflectors'
        factors [n].
    """
    n = c_nn.shape[0]
    _check(c_nn)
    diagonal, beside, factors = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    if n == 0:
        return diagonal, beside, factors
    work = torch.empty(1, dtype=torch.float64)
    head = ("L", n, c_nn, n, diagonal, beside, factors)
    _lapack("dsytrd", *head, work, -1)
    work = torch.empty(int(work[0]), dtype=torch.float64)
    _lapack("dsytrd", *head, work, work.numel())
    return diagonal, beside, factors


def tridiagonal_values(diagonal: Tensor, beside: Tensor) -> Tensor:
    """Return the eigenvalues [n] of T, ascending; see `tridiagonalise` for the arguments."""
    values, spent = diagonal.clone(), beside.clone()
    _check(values, spent)
    if values.numel():
        _lapack("dsterf", values.numel(), values, spent)
    return values


def tridiagonal_vectors(diagonal: Tensor, beside: Tensor, k: int) -> Tensor:
    """Return the eigenvectors of the k smallest eigenvalues of T, ascending, as rows [k, n]."""
    n = diagonal.numel()
    assert 0 < k <= n, f"{k} of {n} vectors"
    d, e = diagonal.clone(), beside.clone()
    _check(d, e)
    rows_kn = torch.empty(k, n, dtype=torch.float64)
    values, work = (torch.empty(size, dtype=torch.float64) for size in (n, 18 * n))
    support, work_int, found, careful = (
        torch.zeros(size, dtype=torch.int32) for size in (2 * n, 10 * n, 1, 1)
    )
    _lapack(
        "dstemr", "V", "I", n, d, e, 0.0, 0.0, 1, k, found, values, rows_kn, n, k, support, careful,
        work, work.numel(), work_int, work_int.numel(),
    )  # fmt: skip
    assert int(found[0]) == k, f"{int(found[0])} of {k} vectors"
    return rows_kn


def apply_reflectors(c_nn: Tensor, factors: Tensor, rows_kn: Tensor) -> None:
    """Replace every row z of `rows_kn` by Q z, in place; see `tridiagonalise`."""
    k, n = rows_kn.shape
    assert c_nn.shape == (n, n), (tuple(c_nn.shape), tuple(rows_kn.shape))
    _check(c_nn, factors, rows_kn)
    work = torch.empty(1, dtype=torch.float64)
    head = ("L", "L", "N", n, k, c_nn, n, factors, rows_kn, n)
    _lapack("dormtr", *head, work, -1)
    work = torch.empty(int(work[0]), dtype=torch.float64)
    _lapack("dormtr", *head, work, work.numel())


def pivoted_cholesky(c_nn: Tensor) -> tuple[Tensor, Tensor, int]:
    """Factor a positive semi-definite C with complete pivoting, in place.

    Args:
        c_nn: [n, n] float64, contiguous; only the upper triangle is read. It is overwritten: with
            R the upper triangle of its first q rows, C[p][:, p] = R^T R up to n eps max C_ii.

    Returns:
        C itself, the pivots p [n] and the numerical rank q.
    """
    n = c_nn.shape[0]
    assert n > 0, "nothing to factor"
    _check(c_nn)
    pivots, rank = (torch.zeros(size, dtype=torch.int32) for size in (n, 1))
    work = torch.empty(2 * n, dtype=torch.float64)
    # A positive `info` says only that C is singular: what the rank is for.
    _lapack("dpstrf", "L", n, c_nn, n, pivots, rank, -1.0, work, fine=(0, 1))
    return c_nn, pivots.to(torch.int64) - 1, int(rank[0])


def _lapack(name: str, *arguments: Argument, fine: tuple[int, ...] = (0,)) -> None:
    info = torch.zeros(1, dtype=torch.int32)
    _call("lapack", name, *arguments, info)
    status = int(info[0])
    assert status >= 0, f"{name}: argument {-status} is wrong"
    if status not in fine:
        message = f"{name} ended with status {status}"
        raise torch.linalg.LinAlgError(message)  # pyright: ignore[reportPrivateImportUsage]


def _call(library: str, name: str, *arguments: Argument) -> None:
    _routine(library, name, len(arguments))(*(_pointer(each) for each in arguments))


def _pointer(value: Argument) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, str):
        return ctypes.byref(ctypes.c_char(value.encode("ascii")))
    return ctypes.byref(ctypes.c_int(value) if isinstance(value, int) else ctypes.c_double(value))


@cache
def _routine(library: str, name: str, count: int) -> Callable[..., None]:
    """A routine of SciPy's library by name; every Fortran argument is a pointer."""
    capsule: Any = importlib.import_module(f"scipy.linalg.cython_{library}").__pyx_capi__[name]
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    function_type = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)
    return function_type(address(capsule, signature(capsule)))


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.device.type == "cpu", tensor.device
        assert tensor.dtype == torch.float64 and tensor.is_contiguous(), (
            tensor.dtype,
            tensor.stride(),
        )
