"""What the two Gaussians differ in, the scale S of ŷ = μ + S ε. gaussian.py and mvn.py fill it in by the type of scale.

With z = S⁻¹ (ŷ - μ), gradients as lanes without derivatives, and pointers that are read only where their flag says so:

    suspicious(kind, parameter)                  whether any row may have to be refused, see kernels.py
    prepared(kind, parameter, scratch, whitens)  the scale; kind is DiagonalKind or TriangularKind
    log_determinant(scale)                       log det S
    stretch(scale, base, eps, y)                 y = base + S eps
    whiten(scale, residual, z)                   z = S⁻¹ residual
    whiten_noise(scale, mean, eps, z)            z of the constant sample stop(μ + S eps): eps, on duals with the
                                                 derivative that μ and S give it
    add_score(scale, f, z, need_mean, mean, need_scale, to_scale)   adds f ∂log p(ŷ)/∂(μ, S) for a constant ŷ
    add_path(scale, slope, eps, to_scale)        adds the gradient of slopeᵀ S eps
    add_entropy(scale, f, to_scale)              adds f ∂(log det S)/∂S
    trace(scale, u, weight, need_scale, to_scale, need_precision, to_precision)
                                                 tr(U S Sᵀ); adds weight times its gradients
    reward_variance(scale, u, x)                 2 tr(U Σ U Σ) + 4 xᵀ Σ x
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from numba.extending import overload

from .lanes import HELPER, INLINED


class DiagonalKind(NamedTuple):
    dim: int


class TriangularKind(NamedTuple):
    dim: int


class DiagonalScale(NamedTuple):
    """Pointers: log σ, σ, 1/σ, each dim."""

    dim: int
    log_std: Any
    std: Any
    inverse_std: Any


class TriangularScale(NamedTuple):
    """Pointers: L by rows, dim * dim; 1 / L_jj, dim; scratch, 2 dim."""

    dim: int
    tril: Any
    inverse_diag: Any
    work: Any


def scale_size(kind: DiagonalKind | TriangularKind) -> int:
    """Numbers in the parameter of S."""
    return kind.dim if isinstance(kind, DiagonalKind) else kind.dim**2


_BODIES: dict[Any, dict[type, Callable[..., Any]]] = {}


def _by_scale(function: Callable[..., Any], inline: bool = True) -> Callable[..., Any]:
    """A function whose body depends on the type of its first argument."""
    bodies = _BODIES[function] = {}

    @overload(function, strict=False, jit_options=INLINED if inline else HELPER)
    def choose(*arguments):
        return bodies[arguments[0].instance_class]

    return function


def implements(function: Callable[..., Any], kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares the body of `function` for scales of this type."""

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        _BODIES[function][kind] = body
        return body

    return add


@_by_scale
def suspicious(kind, parameter):
    raise NotImplementedError


@_by_scale
def prepared(kind, parameter, scratch, whitens):
    raise NotImplementedError


@_by_scale
def log_determinant(scale):
    raise NotImplementedError


@_by_scale
def stretch(scale, base, eps, y):
    raise NotImplementedError


@_by_scale
def whiten(scale, residual, z):
    raise NotImplementedError


@_by_scale
def whiten_noise(scale, mean, eps, z):
    raise NotImplementedError


@_by_scale
def add_score(scale, f, z, need_mean, mean, need_scale, to_scale):
    raise NotImplementedError


@_by_scale
def add_path(scale, slope, eps, to_scale):
    raise NotImplementedError


@_by_scale
def add_entropy(scale, f, to_scale):
    raise NotImplementedError


@_by_scale
def trace(scale, u, weight, need_scale, to_scale, need_precision, to_precision):
    raise NotImplementedError


@_by_scale
def reward_variance(scale, u, x):
    raise NotImplementedError
