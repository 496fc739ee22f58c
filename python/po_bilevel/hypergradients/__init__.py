"""Hypergradients dF(θ*(φ), φ)/dφ of a bilevel problem, behind one interface.

    outer   min_φ F(θ*(φ), φ)        inner   θ*(φ) = argmin_θ L(θ, φ), or a root of g(θ, φ) = 0

A method is called with the two losses as functions of (θ, φ), any pytrees of tensors, and returns a `Hypergradient`:
the gradient, and what there is to know about how it was come by. `solve` gives θ*(φ) as an operation of autograd. The
losses have to be deterministic functions: a method that evaluates them more than once must see the same batch and the
same random numbers each time. Fix the batch outside, and the seed of what draws from generators of its own (the
sampled losses of `po_kernels` take one); torch's default generators, which dropout draws from, are put back at each
evaluation.
docs/hypergradients.md compares the methods.
"""

from .equations import FixedPointProblem, RootProblem
from .first_order import BOME, EvolutionStrategies, FiniteDifference, Penalty
from .implicit import Dense, FixedPoint, Identity, ImplicitCG, LinearSolver, Neumann, NormalCG, SingleLoop
from .interface import Hypergradient, HypergradientMethod, Loss, Tensors
from .minibatches import Minibatches
from .preconditioners import Jacobi, Nystrom, QuasiNewton
from .sampled import FisherCG, MomentMatching, SampledObjective, completion_credit
from .solution import solve
from .unrolled import Recompute, Truncated, Unrolled

__all__ = [
    "BOME", "Dense", "EvolutionStrategies", "FiniteDifference", "FisherCG", "FixedPoint", "FixedPointProblem",
    "Hypergradient", "HypergradientMethod", "Identity", "ImplicitCG", "Jacobi", "LinearSolver", "Loss", "Minibatches",
    "MomentMatching", "Neumann", "NormalCG", "Nystrom", "Penalty", "QuasiNewton", "Recompute", "RootProblem",
    "SampledObjective", "SingleLoop", "Tensors", "Truncated", "Unrolled", "completion_credit", "solve",
]  # fmt: skip
