"""What makes conjugate gradients need fewer products: approximations of (H + δI)⁻¹ that are cheap to apply."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor
from typing_extensions import Self

from .problem import ImplicitProblem, flat
from .trees import Point, Tree

Inverse = Callable[[Tensor], Tensor]


class Preconditioner(ABC):
    """Makes a symmetric positive definite M⁻¹ near (H + δI)⁻¹."""

    @abstractmethod
    def inverse(self, problem: ImplicitProblem, damping: float) -> Inverse:
        """v -> M⁻¹ v, flat, (P,) -> (P,)."""

    def at(self, point: Point) -> "Preconditioner":
        """Itself, with functions of tuples for options that are functions of trees."""
        return self

    def elsewhere(self) -> "Preconditioner":
        """One for the same H in a problem whose θ and φ are others."""
        return self


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """The Nyström approximation of H from products with random vectors (Frangella, Tropp and Udell 2023).

    For spectra that fall: a rank of k makes the condition number about (λ_k + δ)/(λ_min + δ), for k products. Hataya
    and Yamada (2023) take the approximation itself for H, which needs a damping; as a preconditioner it only costs
    products where it is poor.

    Attributes:
        rank: k, the number of products and of vectors (P,) that are kept.
        seed: of the random vectors, the same in each call.
    """

    rank: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("Nystrom: rank", self.rank)

    def inverse(self, problem: ImplicitProblem, damping: float) -> Inverse:
        """See `Preconditioner.inverse`."""
        like = problem.right
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(
            like.numel(), min(self.rank, like.numel()), dtype=torch.float64, generator=generator, device="cpu"
        )
        basis = torch.linalg.qr(drawn).Q.to(like)
        images = torch.stack([problem.product(column) for column in basis.mT], dim=1)
        core = basis.mT @ images
        values, vectors = torch.linalg.eigh(0.5 * (core + core.mT))
        # Negative curvature among the vectors is reported as what the solve itself meets is.
        problem.curvature.observe(basis @ vectors[:, 0], images @ vectors[:, 0])
        kept = values > 10.0 * torch.finfo(like.dtype).eps * values.abs().amax()
        if not bool(kept.any()):
            return lambda vector: vector
        root = images @ (vectors[:, kept] / values[kept].sqrt())
        left, singular, _ = torch.linalg.svd(root, full_matrices=False)
        # Outside all directions as along the last of them.
        beyond = 1.0 / (singular[-1].square() + damping)
        more = 1.0 / (singular.square() + damping) - beyond
        return lambda vector: beyond * vector + left @ (more * (left.mT @ vector))


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """The diagonal of H + δI.

    For parameters of very different scales that are not much coupled.

    Attributes:
        diagonal: (θ, φ) -> the diagonal of H, positive, of the form of θ. None estimates it from products with random
            signs z, as the mean of z ⊙ Hz (Bekas et al. 2007), right if entries beside the diagonal are small.
        probes: how many products that takes.
        seed: of the signs, the same in each call.
    """

    diagonal: Callable[[Tree, Tree], Tree] | None = None
    probes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("Jacobi: probes", self.probes)

    def at(self, point: Point) -> Self:
        """See `Preconditioner.at`."""
        given = self.diagonal
        if given is None:
            return self
        made = point.flat(given)
        return replace(self, diagonal=lambda theta, phi: point.theta_of("Jacobi: diagonal", made(theta, phi)))

    def elsewhere(self) -> Self:
        """See `Preconditioner.elsewhere`."""
        return replace(self, diagonal=None)

    def inverse(self, problem: ImplicitProblem, damping: float) -> Inverse:
        """See `Preconditioner.inverse`.

        Raises:
            ValueError: a diagonal that is given and not positive with the damping.
        """
        if self.diagonal is not None:
            with torch.no_grad():
                diagonal = flat(self.diagonal(*problem.place), problem.place[0]) + damping
            if not bool((diagonal > 0).all()):
                raise ValueError(
                    f"Jacobi: diagonal: expected positive numbers with the damping {damping:.3g}, got "
                    f"{float(diagonal.min()):.3g}"
                )
            return lambda vector: vector / diagonal
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros_like(problem.right)
        for _ in range(self.probes):
            signs = (2.0 * torch.randint(2, total.shape, generator=generator, device="cpu") - 1.0).to(total)
            total += signs * problem.product(signs)
        estimate = (total / self.probes).abs() + damping
        # An entry that came out as nothing is not known to be smaller than rounding of the largest.
        estimate = estimate.clamp_min(torch.finfo(total.dtype).eps ** 0.5 * float(estimate.max()))
        return lambda vector: vector / estimate


@dataclass(frozen=True)
class QuasiNewton(Preconditioner):
    """The inverse that L-BFGS has made of its steps while it solved the inner problem.

    `Identity(inverse=QuasiNewton(optimizer))` takes it for H⁻¹, for no product at all (SHINE, Ramzi et al. 2022);
    `ImplicitCG(preconditioner=...)` refines it. It knows H only along the steps that were taken.

    Attributes:
        optimizer: a `torch.optim.LBFGS` of the tensors of θ, in the order of its tree, that has taken steps.
    """

    optimizer: torch.optim.LBFGS

    def inverse(self, problem: ImplicitProblem, damping: float) -> Inverse:
        """See `Preconditioner.inverse`; the damping is none of its.

        Raises:
            ValueError: an optimiser that has taken no steps, or is of other parameters.
        """
        held = self.optimizer.param_groups[0]["params"]
        state = self.optimizer.state[held[0]]
        gradients, steps = state.get("old_dirs", ()), state.get("old_stps", ())
        if not gradients or gradients[0].shape != problem.right.shape:
            raise ValueError(
                f"QuasiNewton: optimizer: expected an LBFGS that has taken steps on {problem.right.numel()} numbers, "
                f"got one that has taken {len(gradients)} on {sum(p.numel() for p in held)}"
            )

        def inverse(vector: Tensor) -> Tensor:
            """The two loops of Nocedal and Wright (2006), algorithm 7.4."""
            factors = []
            for y, s in zip(reversed(gradients), reversed(steps), strict=True):
                factors.append(s @ vector / (y @ s))
                vector = vector - factors[-1] * y
            vector = state["H_diag"] * vector
            for y, s, factor in zip(gradients, steps, reversed(factors), strict=True):
                vector = vector + s * (factor - y @ vector / (y @ s))
            return vector

        return inverse
