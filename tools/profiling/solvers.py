"""Prices of linear algebra that is no contraction: factorisations, and what solves with them.

All are other FLOPs, by the leading terms of the textbook algorithm, whatever a library runs: LU, Cholesky, QR, inverses
and solutions by LAPACK Working Note 41 (Blackford and Dongarra, 1999, appendix C), eigenvalues and singular values by
Golub and Van Loan (Matrix Computations, 4th edition, chapters 7 and 8).  The exponential of a matrix is 5 products, a
polynomial of degree 18 without squarings (Bader et al., 2019).  On complex numbers all cost 4 times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from vizoo.backbones.ops.cost import Cost


def _square(each: float) -> Callable[..., Cost]:
    """``each * n^3`` for every matrix of ``[..., n, n]``."""
    return lambda a, *args, out=None, **kwargs: Cost(other=round(each * prod(a) * a[-1]))


def _lu_flops(m: int, n: int) -> float:
    k = min(m, n)
    return 2 * m * n * k - (m + n) * k**2 + 2 / 3 * k**3


def _householder_flops(m: int, n: int, k: int) -> float:
    """Of the first ``n`` columns of a product of ``k`` reflections."""
    return 4 * m * n * k - 2 * (m + n) * k**2 + 4 / 3 * k**3


def _qr_flops(m: int, n: int) -> float:
    k = min(m, n)
    return 2 * max(m, n) * k**2 - 2 / 3 * k**3


def _all(a: Any, flops: float) -> Cost:
    """As many FLOPs for every matrix of a batch."""
    return Cost(other=round(prod(a[:-2]) * flops))


def _lu(a: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _all(a, _lu_flops(*a[-2:]))


def _solve(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    n = a[-1]
    return Cost(other=round(_lu(a).other + 2 * n * prod(out)))


def _with_factors(each: int, place: int) -> Callable[..., Cost]:
    """``each * n`` for every element of the solution; the matrix ``[..., n, n]`` is the argument at ``place``."""
    return lambda *args, out=None, **kwargs: Cost(other=each * prod(out) * args[place][-1])


def _qr(a: Any, mode: str = "reduced", *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, n = a[-2:]
    columns = {"r": 0, "reduced": min(m, n), "complete": m}[mode]
    return _all(a, _qr_flops(m, n) + (_householder_flops(m, columns, min(m, n)) if columns else 0))


def _geqrf(a: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _all(a, _qr_flops(*a[-2:]))


def _householder(a: Any, tau: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, n = a[-2:]
    return _all(a, _householder_flops(m, n, tau[-1]))


def _ormqr(a: Any, tau: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, k = a[-2], tau[-1]
    return _all(b, prod(b[-2:]) // m * (4 * m * k - 2 * k**2))


def _lstsq(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, n = max(a[-2:]), min(a[-2:])
    columns = b[-1] if len(b) == len(a) else 1
    return _all(a, _qr_flops(m, n) + columns * (4 * m * n - 2 * n**2 + n**2))  # reflections, then a triangle


def _svd_flops(m: int, n: int, full: bool = False, vectors: bool = True) -> float:
    m, n = max(m, n), min(m, n)
    if not vectors:
        return 4 * m * n**2 - 4 / 3 * n**3
    return 4 * m**2 * n + 8 * m * n**2 + 9 * n**3 if full else 14 * m * n**2 + 8 * n**3


def _svd(a: Any, full: bool = False, vectors: bool = True, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, n = a[-2:]
    return _all(a, _svd_flops(m, n, full, vectors))


def _pinv(a: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, n = a[-2:]
    return _all(a, _svd_flops(m, n) + 2 * m * n * min(m, n))


def _polar(a: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    m, n = a[-2:]
    return _all(a, _svd_flops(m, n) + 2 * m * n * min(m, n) + 2 * min(m, n) ** 3)


def _eigh(a: Any, uplo: str = "L", vectors: bool = True, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return _square(9 if vectors else 4 / 3)(a)


SOLVERS: dict[str, Callable[..., Cost]] = {
    **dict.fromkeys(("linalg_lu", "linalg_lu_factor_ex", "_linalg_det", "_linalg_slogdet"), _lu),
    **dict.fromkeys(("cholesky", "linalg_cholesky_ex", "linalg_ldl_factor_ex"), _square(1 / 3)),
    "linalg_inv_ex": _square(2),
    "cholesky_inverse": _square(2 / 3),
    "_linalg_solve_ex": _solve,
    "_spsolve": _solve,
    **dict.fromkeys(("linalg_lu_solve", "linalg_ldl_solve"), _with_factors(2, 0)),
    **dict.fromkeys(("cholesky_solve", "_cholesky_solve_helper"), _with_factors(2, 1)),
    "triangular_solve": _with_factors(1, 1),
    "linalg_solve_triangular": _with_factors(1, 0),
    "linalg_qr": _qr,
    "geqrf": _geqrf,
    "linalg_householder_product": _householder,
    "ormqr": _ormqr,
    "linalg_lstsq": _lstsq,
    "_linalg_svd": _svd,
    "linalg_pinv": _pinv,
    "linalg_polar": _polar,
    "_linalg_eigh": _eigh,
    "linalg_eig": _square(25),
    **dict.fromkeys(("_linalg_eigvals", "linalg_eigvals"), _square(10)),
    "linalg_eigvalsh": _square(4 / 3),  # inside, it asks for vectors while anything watches
    "linalg_svdvals": lambda a, *args, **kwargs: _svd(a, vectors=False),
    "linalg_matrix_sqrth": _square(11),
    "linalg_matrix_exp": _square(10),
}
