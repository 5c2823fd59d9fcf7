"""Linear algebra on curvature: operators, solves, eigenpairs, inverse roots, and estimates with an error bar."""

from hesse.linalg.eigen import Eigenpairs, eigsh
from hesse.linalg.estimate import Estimate, diagonal, frobenius, trace
from hesse.linalg.inverse import damped_inverse, solve_psd
from hesse.linalg.krylov import Solution, solve
from hesse.linalg.operator import LinearOperator
from hesse.linalg.quadrature import Density, logdet, spectral_density
from hesse.linalg.roots import eigenbasis, inverse_root, off_diagonal, root_in_basis

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "LinearOperator",
    "Solution",
    "damped_inverse",
    "diagonal",
    "eigenbasis",
    "eigsh",
    "frobenius",
    "inverse_root",
    "logdet",
    "off_diagonal",
    "root_in_basis",
    "solve",
    "solve_psd",
    "spectral_density",
    "trace",
]
