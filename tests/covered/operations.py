"""Operations as functions of parameters, away from their kinks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from covered.subject import Table, apart, fed, near, spread, symmetric

__all__ = ["ELEMENTWISE", "FUNCTIONAL", "INDEXING", "LINEAR_ALGEBRA", "PRODUCTS", "REDUCTIONS", "SPECTRAL"]


def tall() -> Tensor:
    """[3, 2], with singular values 2 and 1."""
    return torch.linalg.qr(torch.randn(3, 2)).Q * torch.tensor([2.0, 1.0]) @ torch.linalg.qr(torch.randn(2, 2)).Q


def with_zero() -> Tensor:
    """A product's derivatives divide by its factors, unless one of them is zero."""
    return torch.tensor([[0.7, 0.0, -1.2], [0.4, 1.1, 0.9]])


def reals(z: Tensor) -> Tensor:
    return torch.view_as_real(z)


def complexes(x: Tensor, y: Tensor) -> Tensor:
    return torch.complex(x, y)


# fmt: off
PRODUCTS: Table = {
    "matmul": lambda: fed(torch.matmul, spread(2, 3), spread(3, 2)),
    "matmul, broadcast": lambda: fed(torch.matmul, spread(2, 1, 2, 2), spread(2, 2)),
    "einsum": lambda: fed(lambda x, y: torch.einsum("bij,bjk,k->i", x, y, y[0, 0]), spread(2, 2, 3), spread(2, 3, 2)),
    "bmm": lambda: fed(torch.bmm, spread(2, 2, 2), spread(2, 2, 2)),
    "baddbmm": lambda: fed(lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5), *(spread(1, 2, 2) for _ in range(3))),
    "tensordot": lambda: fed(lambda x, y: torch.tensordot(x, y, 2), spread(2, 2, 3), spread(2, 3, 2)),
    "outer": lambda: fed(torch.outer, spread(3), spread(2)),
    "kron": lambda: fed(torch.kron, spread(2, 2), spread(2, 1)),
    "cross": lambda: fed(torch.linalg.cross, spread(2, 3), spread(2, 3)),
    "addcmul, addcdiv": lambda: fed(
        lambda x, y, z: torch.addcmul(x, y, z, value=0.3) + torch.addcdiv(x, y, z), spread(3), spread(3), near(1, 3)
    ),
}

ELEMENTWISE: Table = {
    "abs": lambda: fed(torch.abs, spread(5)),
    "sqrt, rsqrt": lambda: fed(lambda x: x.sqrt() + x.rsqrt(), near(1, 5)),
    "exp, expm1, log, log1p": lambda: fed(lambda x: x.exp() * x.expm1() + x.log() * x.log1p(), near(1, 5)),
    "erf, erfinv": lambda: fed(lambda x: x.erf() * (x / 2).erfinv(), spread(5)),
    "lgamma, digamma": lambda: fed(lambda x: x.lgamma() + x.digamma(), near(2, 5)),
    "polygamma": lambda: fed(lambda x: torch.polygamma(2, x), near(2, 5)),
    "sin, cos, tan": lambda: fed(lambda x: x.sin() * x.cos() + (x / 2).tan(), spread(5)),
    "asin, acos, atan": lambda: fed(lambda x: x.asin() * x.acos() + x.atan(), spread(5, width=0.8)),
    "sinh, asinh, acosh, atanh":
        lambda: fed(lambda x: x.sinh() * x.asinh() + (2 + x).acosh() * x.atanh(), spread(5, width=0.8)),
    "atan2": lambda: fed(torch.atan2, spread(4), near(1, 4)),
    "hypot": lambda: fed(torch.hypot, spread(4), near(1, 4)),
    "pow, learned exponent": lambda: fed(torch.pow, near(1, 4), spread(4)),
    "pow, whole powers at zero": lambda: fed(lambda x: x**2 + x**3 + x**4, torch.tensor([0.0, 0.5, -0.7])),
    "clamp": lambda: fed(lambda x: x.clamp(-0.8, 1.2), spread(5)),
    "clamp, learned limits": lambda: fed(torch.clamp, spread(5), -near(1, 5), near(1, 5, width=0.1)),
    "where": lambda: fed(lambda x: torch.where(x > 0, x.sin(), x**2), spread(5)),
    "maximum, minimum": lambda: fed(lambda x, y: torch.maximum(x, y**2) * torch.minimum(x, y), spread(5), near(0.3, 5)),
    "remainder": lambda: fed(lambda x: x.remainder(0.83) * x, spread(5)),
    "logaddexp": lambda: fed(torch.logaddexp, spread(4), spread(4)),
    "xlogy, xlog1py": lambda: fed(lambda x, y: torch.xlogy(x, y) * torch.special.xlog1py(x, y), spread(4), near(1, 4)),
    "special: i0e, i1, ndtri, log_ndtr, erfcx": lambda: fed(special, near(0.6, 4, width=0.2)),
    "sinc": lambda: fed(torch.sinc, spread(5)),
    "sinc at zero": lambda: fed(torch.sinc, torch.tensor([0.0, 0.4])),
    "lerp": lambda: fed(torch.lerp, spread(3), spread(3), spread(3)),
    "in place": lambda: fed(in_place, spread(5)),
    "in place, a slice": lambda: fed(slices_in_place, spread(5)),
    "logit": lambda: fed(torch.logit, near(0.5, 4)),
}


def special(x: Tensor) -> Tensor:
    s = torch.special
    return s.i0e(x) * s.i1(x) + s.ndtri(x) * s.log_ndtr(x) + s.erfcx(x)


def in_place(x: Tensor) -> Tensor:
    return x.clone().mul_(x).add_(1.0).sin_().mul_(x).exp_()


def slices_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:3] *= x[3:5].sin()
    y[0] = x[1] * x[4]
    return y


REDUCTIONS: Table = {
    "softmax": lambda: fed(lambda x: F.softmax(x, 0), spread(3, 2)),
    "log_softmax": lambda: fed(lambda x: F.log_softmax(x, 0), spread(3, 2)),
    "logsumexp": lambda: fed(lambda x: x.logsumexp(1), spread(2, 3)),
    "logcumsumexp": lambda: fed(lambda x: x.logcumsumexp(1), spread(2, 3)),
    "norm, p = 1": lambda: fed(lambda x: torch.linalg.vector_norm(x, 1, 1), spread(2, 3)),
    "norm, p = 2": lambda: fed(lambda x: torch.linalg.vector_norm(x, 2, 1), spread(2, 3)),
    "norm, p = 3": lambda: fed(lambda x: torch.linalg.vector_norm(x, 3, 1), spread(2, 3)),
    "norm, p = inf": lambda: fed(lambda x: torch.linalg.vector_norm(x, float("inf"), 1), spread(2, 3)),
    "cumsum": lambda: fed(lambda x: x.cumsum(1), spread(2, 3)),
    "cumprod": lambda: fed(lambda x: x.cumprod(1), spread(2, 3)),
    "cumprod, one factor zero": lambda: fed(lambda x: x.cumprod(1), with_zero()),
    "cummax": lambda: fed(lambda x: x.cummax(1).values, spread(2, 3)),
    "prod": lambda: fed(lambda x: x.prod(1), spread(2, 3)),
    "prod, one factor zero": lambda: fed(lambda x: x.prod(1), with_zero()),
    "mean, var, std": lambda: fed(lambda x: x.mean(1) * x.var(1) + x.std(1, correction=0), spread(2, 4)),
    "max, min": lambda: fed(lambda x: x.max(1).values * x.min(1).values, spread(2, 3)),
    "amax, aminmax": lambda: fed(lambda x: x.amax(1) * x.aminmax(dim=0).min[:2], spread(2, 3)),
    "median, quantile": lambda: fed(lambda x: x.median(1).values * x.quantile(0.3, 1), spread(2, 4)),
    "cov, corrcoef": lambda: fed(lambda x: torch.cov(x) + torch.corrcoef(x), spread(2, 4)),
    "diff, trapezoid": lambda: fed(lambda x: torch.trapezoid(x.diff() ** 2, x[:, 1:]), spread(2, 4)),
}

INDEXING: Table = {
    "sort": lambda: fed(lambda x: x.sort(1).values, spread(2, 3)),
    "topk": lambda: fed(lambda x: x.topk(2, 1).values, spread(2, 4)),
    "gather": lambda: fed(lambda x: x.gather(1, torch.tensor([[0, 2, 2], [1, 1, 0]])), spread(2, 3)),
    "index_select": lambda: fed(lambda x: x.index_select(1, torch.tensor([2, 0, 2])), spread(2, 3)),
    "indexing by a mask": lambda: fed(lambda x: x[x > 0] * x.masked_fill(x < 0, 0.5).sum(), spread(6)),
    "scatter_add": lambda: fed(lambda x, y: x.scatter_add(0, torch.tensor([0, 2, 2]), y), spread(4), spread(3)),
    "scatter_reduce, prod": lambda: fed(
        lambda x, y: x.scatter_reduce(0, torch.tensor([0, 2, 2]), y, "prod"), near(1, 4), near(1, 3)
    ),
    "scatter_reduce, amax": lambda: fed(
        lambda x, y: x.scatter_reduce(0, torch.tensor([0, 2, 2]), y, "amax"), spread(4), near(0.5, 3)
    ),
    "index_add": lambda: fed(lambda x, y: x.index_add(0, torch.tensor([0, 2, 0]), y), spread(4), spread(3)),
    "index_put, accumulating":
        lambda: fed(lambda x, y: x.index_put((torch.tensor([0, 0, 1]),), y, accumulate=True), spread(3), spread(3)),
    "take_along_dim": lambda: fed(lambda x: torch.take_along_dim(x, x.argsort(0), 0), spread(2, 3)),
    "roll, flip": lambda: fed(lambda x: x.roll(1, 1) * x.flip(1), spread(2, 3)),
    "unfold": lambda: fed(lambda x: x.unfold(0, 3, 1), spread(5)),
    "tril, triu": lambda: fed(lambda x: x.tril() @ x.triu(), spread(3, 3)),
    "diag_embed, diagonal": lambda: fed(lambda x: torch.diag_embed(x) @ torch.diag_embed(x.diagonal(), 1)[:2, :2],
                                        spread(2, 2)),
    "cat, stack, chunk": lambda: fed(
        lambda x, y: torch.cat([x, torch.stack(y.chunk(2)).prod(0)]), spread(2), spread(4)
    ),
    "as_strided": lambda: fed(lambda x: x.as_strided((3, 2), (1, 2)), spread(5)),
    "repeat_interleave, tile": lambda: fed(lambda x: x.repeat_interleave(2) * x.tile(2), spread(3)),
}

LINEAR_ALGEBRA: Table = {
    "solve": lambda: fed(torch.linalg.solve, symmetric(3), spread(3, 2)),
    "solve_triangular": lambda: fed(lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
                                    symmetric(3).triu(), spread(3, 2)),
    "lstsq": lambda: fed(lambda a, b: torch.linalg.lstsq(a, b).solution, spread(4, 2), spread(4, 1)),
    "cholesky": lambda: fed(lambda a: torch.linalg.cholesky(a @ a.mT + torch.eye(3, dtype=a.dtype)), symmetric(3)),
    "cholesky_solve": lambda: fed(lambda b, a: torch.cholesky_solve(b, a.tril()), spread(3, 1), symmetric(3)),
    "inv": lambda: fed(torch.linalg.inv, symmetric(3)),
    "pinv": lambda: fed(torch.linalg.pinv, tall()),
    "det": lambda: fed(torch.linalg.det, symmetric(3)),
    "slogdet": lambda: fed(lambda a: torch.linalg.slogdet(a).logabsdet, symmetric(3)),
    "logdet": lambda: fed(torch.logdet, symmetric(3)),
    "qr": lambda: fed(lambda a: torch.cat(torch.linalg.qr(a)), spread(3, 2)),
    "lu": lambda: fed(lambda a: torch.cat(torch.linalg.lu(a)[1:]), symmetric(3)),
    "svdvals": lambda: fed(torch.linalg.svdvals, spread(3, 2)),
    "svd": lambda: fed(lambda a: rank_one(*torch.linalg.svd(a, full_matrices=False)), spread(3, 2)),
    "eigh": lambda: fed(lambda a: rank_one(*torch.linalg.eigh(a + a.mT)[::-1]), symmetric(3)),
    "eigvals": lambda: fed(lambda a: torch.linalg.eigvals(a).abs(), symmetric(3)),
    "matrix_exp": lambda: fed(torch.linalg.matrix_exp, spread(3, 3)),
    "matrix_power": lambda: fed(lambda a: torch.linalg.matrix_power(a, 3), spread(3, 3)),
    "matrix_norm, nuclear": lambda: fed(lambda a: torch.linalg.matrix_norm(a, "nuc"), spread(3, 2)),
    "matrix_norm, spectral": lambda: fed(lambda a: torch.linalg.matrix_norm(a, 2), spread(3, 2)),
    "householder_product": lambda: fed(torch.linalg.householder_product, spread(3, 2), near(1, 2)),
}


def rank_one(u: Tensor, s: Tensor, vh: Tensor | None = None) -> Tensor:
    """The first term of the decomposition: it does not depend on the signs of the vectors."""
    v = u if vh is None else vh.mT
    return s[..., :1] * u[:, :1] @ v[:, :1].mT


SPECTRAL: Table = {
    "fft": lambda: fed(lambda x: reals(torch.fft.fft(x)), spread(2, 4)),
    "rfft, irfft": lambda: fed(lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, 5), spread(2, 5)),
    "fft2": lambda: fed(lambda x: torch.fft.fft2(x).abs(), spread(2, 3)),
    "stft": lambda: fed(
        lambda x: torch.stft(x, 4, 2, window=torch.hann_window(4, dtype=x.dtype), return_complex=True).abs()[1:],
        spread(8),
    ),
    "istft": lambda: fed(
        lambda x, y: torch.istft(complexes(x, y), 4, 1, window=torch.ones(4, dtype=x.dtype)), spread(3, 4), spread(3, 4)
    ),
    "complex intermediate": lambda: fed(lambda x, y: (complexes(x, y) ** 2).exp().real, spread(3), spread(3)),
    "complex abs, angle": lambda: fed(lambda x, y: complexes(x, y).abs() * complexes(x, y).angle(),
                                        near(1, 3), spread(3)),
    "complex matmul, inv": lambda: fed(
        lambda x, y: reals(torch.linalg.inv(complexes(x, y)) @ complexes(y, x)), symmetric(2), symmetric(2)
    ),
    "polar": lambda: fed(lambda x, y: reals(torch.polar(x, y)), near(1, 3), spread(3)),
}

FUNCTIONAL: Table = {
    "conv1d": lambda: fed(F.conv1d, spread(1, 2, 4), spread(2, 2, 2)),
    "conv2d, strided and dilated":
        lambda: fed(lambda x, w: F.conv2d(x, w, stride=2, dilation=2), spread(1, 1, 5, 5), spread(2, 1, 2, 2)),
    "conv_transpose2d": lambda: fed(F.conv_transpose2d, spread(1, 2, 2, 2), spread(2, 1, 2, 2)),
    "conv_tbc": lambda: fed(F.conv_tbc, spread(3, 1, 2), spread(2, 2, 2), spread(2)),
    "grid_sample, bilinear": lambda: fed(
        lambda x, g: F.grid_sample(x, g, align_corners=False), spread(1, 1, 3, 3), spread(1, 2, 2, 2, width=0.6)
    ),
    "grid_sample, bicubic": lambda: fed(
        lambda x, g: F.grid_sample(x, g, "bicubic", align_corners=False),
        spread(1, 1, 3, 3), spread(1, 1, 2, 2, width=0.6),
    ),
    "grid_sample, 3d": lambda: fed(
        lambda x, g: F.grid_sample(x, g, align_corners=True), spread(1, 1, 2, 3, 2), spread(1, 1, 1, 2, 3, width=0.6)
    ),
    "affine_grid": lambda: fed(lambda t: F.affine_grid(t, [1, 1, 2, 2], align_corners=False), spread(1, 2, 3)),
    "interpolate, bilinear, antialiased": lambda: fed(
        lambda x: F.interpolate(x, (2, 2), mode="bilinear", antialias=True), spread(1, 1, 4, 3)
    ),
    "interpolate, area": lambda: fed(lambda x: F.interpolate(x, (2, 2), mode="area"), spread(1, 1, 4, 3)),
    "scaled_dot_product_attention": lambda: fed(F.scaled_dot_product_attention, *qkv()),
    "scaled_dot_product_attention, causal":
        lambda: fed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv()),
    "scaled_dot_product_attention, mask": lambda: fed(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.tensor([[True, False], [True, True]])), *qkv()
    ),
    "scaled_dot_product_attention, learned mask": lambda: fed(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *qkv(), spread(2, 2)
    ),
    "layer_norm": lambda: fed(lambda x, w, b: F.layer_norm(x, (3,), w, b), spread(2, 3), spread(3), spread(3)),
    "batch_norm": lambda: fed(lambda x, w: F.batch_norm(x, None, None, w, training=True), spread(4, 2), spread(2)),
    "instance_norm": lambda: fed(lambda x, w: F.instance_norm(x, weight=w), spread(2, 2, 3), spread(2)),
    "group_norm": lambda: fed(lambda x, w, b: F.group_norm(x, 2, w, b), spread(2, 4, 2), spread(4), spread(4)),
    "rms_norm": lambda: fed(lambda x, w: F.rms_norm(x, (3,), w), spread(2, 3), spread(3)),
    "local_response_norm": lambda: fed(lambda x: F.local_response_norm(x, 2, 0.5), spread(1, 3, 2)),
    "normalize": lambda: fed(lambda x: F.normalize(x, dim=1), spread(2, 3)),
    "embedding": lambda: fed(lambda w: F.embedding(torch.tensor([[0, 2], [2, 1]]), w), spread(3, 2)),
    "embedding_bag, weighted": lambda: fed(
        lambda w, s: F.embedding_bag(torch.tensor([[0, 2], [2, 1]]), w, mode="sum", per_sample_weights=s),
        spread(3, 2), spread(2, 2),
    ),
    "cdist, p = 1": lambda: fed(lambda x, y: torch.cdist(x, y, 1.0), *apart((2, 3), (2, 3))),
    "cdist, p = 2": lambda: fed(torch.cdist, *apart((2, 3), (2, 3))),
    "cdist, p = 3": lambda: fed(lambda x, y: torch.cdist(x, y, 3.0), *apart((2, 3), (2, 3))),
    "pdist": lambda: fed(F.pdist, spread(3, 2)),
    "cosine_similarity": lambda: fed(lambda x, y: F.cosine_similarity(x[:, None], y, -1), spread(2, 3), spread(2, 3)),
    "huber_loss": lambda: fed(lambda x, y: F.huber_loss(x, y, "none", 0.9), *apart((4,), (4,))),
    "smooth_l1_loss": lambda: fed(lambda x, y: F.smooth_l1_loss(x, y, reduction="none", beta=0.9), *apart((4,), (4,))),
    "kl_div": lambda: fed(
        lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="none"), spread(2, 3), spread(2, 3)
    ),
    "binary_cross_entropy, learned target":
        lambda: fed(lambda x, y: F.binary_cross_entropy(x, y, reduction="none"), near(0.5, 4), near(0.5, 4)),
    "unfold and fold": lambda: fed(lambda x: F.fold(F.unfold(x, 2) ** 2, (3, 3), 2), spread(1, 1, 3, 3)),
    "pixel_shuffle": lambda: fed(lambda x: F.pixel_shuffle(x, 2), spread(1, 4, 1, 2)),
    "gumbel_softmax": lambda: fed(lambda x: F.gumbel_softmax(x, 0.7), spread(2, 3)),
    "bilinear": lambda: fed(F.bilinear, spread(2, 2), spread(2, 2), spread(1, 2, 2)),
    "segment_reduce": lambda: fed(
        lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([2, 3]), unsafe=True), spread(5)
    ),
}
# fmt: on


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return spread(1, 2, 2), spread(1, 2, 2), spread(1, 2, 2)
