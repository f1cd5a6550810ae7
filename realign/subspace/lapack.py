"""The few LAPACK and BLAS routines that torch does not offer, called where the tensors lie.

The library is the one that SciPy brings with it and publishes for other compiled code (the
`__pyx_capi__` tables of `scipy.linalg.cython_blas` and `cython_lapack`). Called through `ctypes`
they work in place on a tensor's memory and let other Python threads run, so that a file is read
while a matrix is decomposed; SciPy's own Python wrappers copy, and hold the interpreter.

Here: the calls, in float64 on the CPU. Not here: what they are called for (`eigen`).

Layout: a row-major tensor is a column-major matrix transposed. Symmetric matrices are therefore
given by their upper triangle (row <= column), which LAPACK sees as the lower one, and a matrix of
column vectors is a tensor whose rows are the vectors.

Every size, type and layout is checked before a call, with errors that `python -O` keeps: what is
wrong here would write over memory that is not ours.
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

INT_MAX = 2**31 - 1
"""The largest size that the library's 32-bit integers can say."""
REFLECTORS = 64
"""Reflectors applied at once."""


def syrk_upper(c_nn: Tensor, block: Tensor, *, by_rows: bool) -> None:
    """Add block block^T (or block^T block) to the upper triangle of C, at half the flops of both.

    Args:
        c_nn: [n, n] float64, contiguous; the lower triangle is neither read nor written.
        block: float64, contiguous: [n, k], or [k, n] if `by_rows`.
        by_rows: whether the rows of the block, not its columns, are summed over.
    """
    n, k = block.shape[::-1] if by_rows else block.shape
    _require_shape(c_nn, n, n)
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
    _require_shape(c_nn, n, n)
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
    _require_shape(beside, diagonal.numel())
    values, spent = diagonal.clone(), beside.clone()
    if values.numel():
        _lapack("dsterf", values.numel(), values, spent)
    return values


def leading_vectors(diagonal: Tensor, beside: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Find the k smallest eigenvalues of T and their vectors, each on its own (MRRR).

    Returns:
        The eigenvalues [k], ascending, and the eigenvectors as rows [k, n]; None where the routine
        gives up, which it may where many eigenvalues are equal.
    """
    n = diagonal.numel()
    if not 0 < k <= n:
        raise ValueError(f"{k} of {n} vectors")
    _require_shape(beside, n)
    d, e = diagonal.clone(), beside.clone()
    rows_kn = torch.empty(k, n, dtype=torch.float64)
    values, work = (torch.empty(size, dtype=torch.float64) for size in (n, 18 * n))
    support, work_int, found, careful = (
        torch.zeros(size, dtype=torch.int32) for size in (2 * n, 10 * n, 1, 1)
    )
    status = _status(
        "dstemr", "V", "I", n, d, e, 0.0, 0.0, 1, k, found, values, rows_kn, n, k, support, careful,
        work, work.numel(), work_int, work_int.numel(),
    )  # fmt: skip
    return (values[:k], rows_kn) if status == 0 and int(found[0]) == k else None


def all_vectors(diagonal: Tensor, beside: Tensor) -> Tensor:
    """Return all eigenvectors of T, ascending, as rows [n, n], by divide and conquer.

    Its work space has n^2 entries. From n = 46340 on that number needs more than 32 bits, and the
    slower QR iteration takes its place.
    """
    n = diagonal.numel()
    _require_shape(beside, n)
    d, e = diagonal.clone(), beside.clone()
    rows_nn = torch.empty(n, n, dtype=torch.float64)
    size = 1 + 4 * n + n * n
    if n and size <= INT_MAX:
        work = torch.empty(size, dtype=torch.float64)
        work_int = torch.empty(3 + 5 * n, dtype=torch.int32)
        _lapack("dstevd", "V", n, d, e, rows_nn, n, work, size, work_int, work_int.numel())
    elif n:
        _lapack("dsteqr", "I", n, d, e, rows_nn, n, torch.empty(2 * n, dtype=torch.float64))
    return rows_nn


def apply_reflectors(c_nn: Tensor, factors: Tensor, rows_kn: Tensor) -> None:
    """Replace every row z of `rows_kn` by Q z, in place; see `tridiagonalise`.

    What LAPACK's dormtr does, in products with larger blocks: for few rows it takes half the time.
    The product of the reflectors I - tau v v^T of a block is I - V T V^T, where the inverse of T is
    the upper triangle of V^T V with 1 / tau on its diagonal.
    """
    n = rows_kn.shape[1]
    _require_shape(c_nn, n, n)
    _require_shape(factors, n)
    for each in (c_nn, factors, rows_kn):
        _require_memory(each)
    for start in reversed(range(0, n - 1, REFLECTORS)):
        stop = min(start + REFLECTORS, n - 1)
        # Reflector i has a 1, not stored, at i + 1 and its other entries to the right of that.
        v_bm = c_nn[start:stop, start + 1 :].triu(1)
        v_bm.diagonal().fill_(1.0)
        tau_b = factors[start:stop]
        v_bm[tau_b == 0.0] = 0.0  # no reflector at all
        inverse_bb = (v_bm @ v_bm.T).triu(1)
        inverse_bb.diagonal().copy_(torch.where(tau_b == 0.0, 1.0, 1.0 / tau_b))
        part_km = rows_kn[:, start + 1 :]
        along_bk = torch.linalg.solve_triangular(inverse_bb, v_bm @ part_km.T, upper=True)
        part_km.addmm_(along_bk.T, v_bm, alpha=-1.0)


def pivoted_cholesky(c_nn: Tensor) -> tuple[Tensor, Tensor, int]:
    """Factor a positive semi-definite C with complete pivoting, in place.

    Args:
        c_nn: [n, n] float64, contiguous; only the upper triangle is read. It is overwritten: with
            R the upper triangle of its first q rows, C[p][:, p] = R^T R up to n eps max C_ii.

    Returns:
        C itself, the pivots p [n] and the numerical rank q.
    """
    n = c_nn.shape[0]
    if not n:
        raise ValueError("nothing to factor")
    _require_shape(c_nn, n, n)
    pivots, rank = (torch.zeros(size, dtype=torch.int32) for size in (n, 1))
    work = torch.empty(2 * n, dtype=torch.float64)
    # A positive `info` says only that C is singular: what the rank is for.
    _lapack("dpstrf", "L", n, c_nn, n, pivots, rank, -1.0, work, fine=(0, 1))
    return c_nn, pivots.to(torch.int64) - 1, int(rank[0])


def invert_cholesky(c_nn: Tensor) -> bool:
    """Factor a positive definite C = L L^T, L lower triangular, and leave L^-1 in its place.

    Args:
        c_nn: [n, n] float64, contiguous; here the *lower* triangle is read and overwritten, the
            entries above the diagonal are left as they are.

    Returns:
        False where C is not positive definite; the lower triangle is then spoilt.
    """
    n = c_nn.shape[0]
    _require_shape(c_nn, n, n)
    if not n:
        return True
    # To LAPACK, whose columns are our rows, this is the upper triangle of C = R^T R, R = L^T.
    if _status("dpotrf", "U", n, c_nn, n) > 0:
        return False
    _lapack("dtrtri", "U", "N", n, c_nn, n)
    return True


def _lapack(name: str, *arguments: Argument, fine: tuple[int, ...] = (0,)) -> None:
    status = _status(name, *arguments)
    if status not in fine:
        message = f"{name} ended with status {status}"
        raise torch.linalg.LinAlgError(message)  # pyright: ignore[reportPrivateImportUsage]


def _status(name: str, *arguments: Argument) -> int:
    info = torch.zeros(1, dtype=torch.int32)
    _call("lapack", name, *arguments, info)
    status = int(info[0])
    if status < 0:
        raise ValueError(f"{name}: argument {-status} is wrong")
    return status


def _call(library: str, name: str, *arguments: Argument) -> None:
    _routine(library, name, len(arguments))(*(pointer(each) for each in arguments))


def pointer(value: Argument) -> Any:
    """Return an argument as Fortran takes it, by reference; ValueError, OverflowError if it cannot.

    A tensor must outlive the call.
    """
    if isinstance(value, Tensor):
        _require_memory(value)
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, str):
        return ctypes.byref(ctypes.c_char(value.encode("ascii")))
    if isinstance(value, float):
        return ctypes.byref(ctypes.c_double(value))
    if not -1 <= value <= INT_MAX:  # ctypes would take the lowest 32 bits
        raise OverflowError(f"{value} is no size of 32 bits")
    return ctypes.byref(ctypes.c_int(value))


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


def _require_shape(tensor: Tensor, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, not {shape}")


def _require_memory(tensor: Tensor) -> None:
    """Raise ValueError where the library would read or write what is not there."""
    kind = (tensor.device.type, tensor.dtype)
    if kind not in (("cpu", torch.float64), ("cpu", torch.int32)) or not tensor.is_contiguous():
        raise ValueError(f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}")
