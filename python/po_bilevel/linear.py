"""Linear policies of all folds together, brought to their minimum by second-order methods made for their losses.

A softmax of logits that are linear in x has Hessian products in closed form: two matrix products for all folds, and a
little arithmetic on each logit between them. `Softmax` trains it by Newton's method, whose steps conjugate gradients
solve; the preconditioner is the mean of all folds' Hessians, one for all of them and for the hypergradient's solve too,
and everything starts from where it ended last. A linear Gaussian is ridge regression: `Ridge` has its optimum in closed
form, from moments of the data.

Steps and their solves are in single precision, losses and gradients, which say where the optimum is, in double.
"""

import math
from typing import cast

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from .crossfit import FullStack, Rows, in_units, network_of, set_covariance
from .hypergradients import Tensors
from .members import Learned, Members
from .policies import CategoricalPolicy, GaussianPolicy
from .rewards import MatrixReward, TabularReward, as_matrix
from .training import check_finite

# Added to the Hessian, whose null direction is the equal shift of a softmax policy's intercepts.
DAMPING = 1e-6
# Residuals of linear solves, relative to their right-hand side: of a step, and of the hypergradient.
STEP, HYPERGRADIENT = 0.25, 3e-3
# The most products in one solve.
PRODUCTS = 100
# Of the standardised inputs' covariance, below which an eigenvalue is none.
SINGULAR = 1e-10
# The largest matrix that is factored for a preconditioner, and the rows that are summed for it at once.
LARGEST, CHUNK = 2000, 4096
# Of the preconditioner's largest entry, added to its diagonal: its sums are of single precision.
ROUNDING = 1e-6
# What of a loss is rounding.
ROUNDED = 1e-13
# Products in a solve that need no better preconditioner.
FEW = 5


class Softmax(Members):
    """Linear softmax policies under a reward for each pair of answer and label: see `Members`.

    With p the probabilities of a row, r = R[:, y] its rewards and a = log p - r, its loss is L = p·a, the gradient in
    the logits g = p ∘ (a - L), and the Hessian diag(p + g) - p pᵀ - g pᵀ - p gᵀ. Likelihood's gradient is p - e_y, its
    Hessian the same with g = 0.

    Attributes:
        products, factorisations: Hessian products and preconditioners so far.
    """

    policy: CategoricalPolicy

    def __init__(
        self, policy: CategoricalPolicy, rows: Rows, inside: Tensor, *, tol: float, max_iter: int
    ) -> None:  # fmt: skip
        self.policy, self._tol, self._most = policy, tol, max_iter
        network = network_of(policy)
        inputs, self._basis = row_space(rows.inputs)
        with torch.no_grad():
            theta = torch.cat([_in_basis(network.weights[0], self._basis), network.biases[0]], dim=1).mT
        self._theta = theta.numpy().copy()  # (M, C, F+1)
        members, classes, features = self._theta.shape
        self._inputs = np.column_stack([inputs.numpy(), np.ones(len(inputs))])
        self._inputs32 = self._inputs.astype(np.float32)
        self._labels = rows.target.numpy()
        self._one_hot = np.equal.outer(np.arange(classes), self._labels).astype(np.float64)
        outside = (rows.weight - inside).clamp(min=0.0).numpy()
        total = outside.sum(axis=1)
        self._share = (outside / total[:, None])[:, None]
        self._inside = (inside.numpy() / float(rows.weight.sum()))[:, None]
        # Of l2 = 1; `_penalty` is that of the l2 that is trained under.
        self._unit_penalty = np.zeros((members, 1, features))
        self._unit_penalty[:, :, :-1] = (1.0 / total)[:, None, None]
        self._inverse: np.ndarray | None = None
        self._blocks = features <= LARGEST
        # Products in excess of few since the preconditioner was made; it costs as much as `_worth` of them.
        self._excess, self._worth = 0, classes * features / (2.0 * members)
        self._adjoint = np.zeros_like(self._theta)
        self.products: int = 0
        self.factorisations: int = 0
        self.keep()

    def begin(self, l2: float) -> None:
        self._penalty = l2 * self._unit_penalty
        self._newton(None, self._tol)
        self.keep()
        self._write()

    def train(self, phi: Learned) -> int:
        self._theta = self._kept
        with torch.no_grad():
            table, self._penalty = self._table(phi).numpy(), float(phi.l2()) * self._unit_penalty
        steps = self._newton(table[:, self._labels], self._tol)
        self._write()
        return steps

    def evaluate(self, phi: Learned) -> tuple[float, Tensors]:
        self.train(phi)
        loss = -float((self._inside * self._one_hot * self._log_p).sum())
        self._adjoint = self._solve(
            self._summed(self._inside * (self._p - self._one_hot)), self._adjoint, HYPERGRADIENT
        )
        change = self._logits(self._adjoint)
        change -= np.einsum("mcn,mcn->mn", self._p, change)[:, None]
        change *= self._share * self._p
        by_table = torch.from_numpy(change.sum(axis=0) @ self._one_hot.T)
        by_l2 = -float(_dot(self._adjoint, self._unit_penalty * self._theta).sum())
        with torch.enable_grad():
            linear = (self._table(phi) * by_table).sum() + phi.l2() * by_l2
            return loss, torch.autograd.grad(linear, list(phi.parameters()))

    def keep(self) -> None:
        self._kept = self._theta

    def _write(self) -> None:
        network, theta = network_of(self.policy), torch.from_numpy(self._theta).mT
        with torch.no_grad():
            network.weights[0].copy_(_out_of_basis(theta[:, :-1], self._basis))
            network.biases[0].copy_(theta[:, -1:])

    @staticmethod
    def _table(phi: Learned) -> Tensor:
        return cast(TabularReward, phi.reward).table()

    def _logits(self, theta: np.ndarray) -> np.ndarray:
        """(M, C, F+1) -> (M, C, N)."""
        return (theta.reshape(-1, theta.shape[2]) @ self._inputs.T).reshape(*theta.shape[:2], -1)

    def _summed(self, logits: np.ndarray) -> np.ndarray:
        """The transpose of `_logits`."""
        return (logits.reshape(-1, logits.shape[2]) @ self._inputs).reshape(*logits.shape[:2], -1)

    def _losses(self, theta: np.ndarray, rewards: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The members' losses (M,) and their gradients, of the likelihood or under rewards (C, N)."""
        log_p = self._logits(theta)
        log_p -= log_p.max(axis=1, keepdims=True)
        p = np.exp(log_p)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        log_p -= np.log(total)
        if rewards is None:
            loss = -(self._one_hot * log_p).sum(axis=1)
            slope, bend = p - self._one_hot, np.zeros_like(p)
        else:
            slope = log_p - rewards
            loss = np.einsum("mcn,mcn->mn", p, slope)
            slope -= loss[:, None]
            slope *= p
            bend = slope
        self._p, self._log_p, self._bend = p, log_p, bend
        value = np.einsum("mn,mn->m", self._share[:, 0], loss) + 0.5 * _dot(self._penalty * theta, theta)
        return value, self._summed(self._share * slope) + self._penalty * theta

    def _product(self, direction: np.ndarray) -> np.ndarray:
        """The Hessian's product with (M, C, F+1), in single precision."""
        self.products += 1
        p, shared, bend, diagonal = self._curvature
        change = (direction.reshape(-1, direction.shape[2]) @ self._inputs32.T).reshape(p.shape)
        mean = np.einsum("mcn,mcn->mn", p, change)[:, None]
        bent = np.einsum("mcn,mcn->mn", bend, change)[:, None]
        change -= mean
        change *= diagonal
        change -= shared * bent
        product = (change.reshape(-1, change.shape[2]) @ self._inputs32).reshape(direction.shape)
        product += self._ridge * direction
        return product

    def _linearise(self) -> None:
        """What products need of the policies as they are: p, and p, g and their sum with the rows' shares."""
        share = self._share.astype(np.float32)
        p, bend = self._p.astype(np.float32), self._bend.astype(np.float32)
        shared = share * p
        self._curvature = p, shared, bend, share * bend + shared
        self._ridge = (self._penalty + DAMPING).astype(np.float32)

    def _factor(self) -> None:
        """The preconditioner: the inverse of the members' mean Hessian (1, D, D), of its blocks (C, F+1, F+1) for each
        class if it is large, or of its diagonal (C, F+1) if these are.

        Where that is not positive definite, far from the optimum, it is Fisher's, which leaves out what the gradient g
        adds and is exact where each row has its own optimum.
        """
        self.factorisations += 1
        self._excess = 0
        p, shared, bend, diagonal = self._curvature
        bend = bend * self._share.astype(np.float32)
        if not self._inverted(p, diagonal, bend):
            self._inverted(p, shared, None)

    def _inverted(self, p: np.ndarray, diagonal: np.ndarray, bend: np.ndarray | None) -> bool:
        members, classes, features = self._theta.shape
        together = classes * features <= LARGEST
        blocks = np.zeros((classes, classes if together else 1, features, features if self._blocks else 1), np.float32)
        for i in range(classes):
            # The class itself, and those after it.
            others = slice(i, classes if together else i + 1)
            curvature = -np.einsum("mn,mcn->cn", diagonal[:, i], p[:, others])
            if bend is not None:
                curvature -= np.einsum("mn,mcn->cn", p[:, i], bend[:, others])
            curvature[0] += diagonal[:, i].sum(axis=0)
            found = blocks[i, others if together else slice(1)]
            for begin in range(0, len(self._inputs32), CHUNK):
                some, part = self._inputs32[begin : begin + CHUNK], curvature[:, begin : begin + CHUNK]
                if self._blocks:
                    found += ((part[:, None] * some.T).reshape(-1, len(some)) @ some).reshape(found.shape)
                else:
                    found += (part @ np.square(some))[:, :, None]
        # The mean over members, and what rounding may have taken from it.
        hessian = blocks.transpose(0, 2, 1, 3).astype(np.float64) / members
        ridge = self._ridge.mean(axis=0)[0]
        if not self._blocks:
            self._inverse = (1.0 / (np.maximum(hessian[:, :, 0, 0], 0.0) + ridge)).astype(np.float32)
            return True
        size = classes * features if together else features
        inverses = np.empty((classes * features // size, size, size), np.float32)
        for matrix, inverse in zip(hessian.reshape(-1, size, size), inverses, strict=True):
            matrix[np.diag_indices(size)] += np.tile(ridge, size // features) + ROUNDING * matrix.diagonal().max()
            factor, failed = lapack.dpotrf(matrix.T, lower=1)
            if failed:
                return False
            lower, _ = lapack.dpotri(factor, lower=1)
            inverse[:] = lower
            upper = np.triu_indices(size, 1)
            inverse[upper] = inverse.T[upper]
        self._inverse = inverses
        return True

    def _preconditioned(self, gradient: np.ndarray) -> np.ndarray:
        inverse = cast(np.ndarray, self._inverse)
        if not self._blocks:
            return gradient * inverse
        if len(inverse) == 1:
            return (gradient.reshape(len(gradient), -1) @ inverse[0]).reshape(gradient.shape)
        return (gradient.transpose(1, 0, 2) @ inverse).transpose(1, 0, 2)

    def _solve(self, right: np.ndarray, start: np.ndarray | None, relative: float, least: float = 0.0) -> np.ndarray:
        """H⁻¹ right for each member, by conjugate gradients that end where a residual is short enough.

        A member that meets negative curvature keeps what it has, or the preconditioned gradient.
        """
        self._linearise()
        if self._inverse is None or self._excess > self._worth:
            self._factor()
        residual = right.astype(np.float32)
        target = np.maximum(relative**2 * _dot(residual, residual), least**2)
        solution = np.zeros_like(residual)
        if start is not None:
            solution = start.astype(np.float32)
            residual -= self._product(solution)
        direction = step = self._preconditioned(residual)
        length = _dot(residual, step)
        live = _dot(residual, residual) > target
        taken = 0
        while live.any() and taken < PRODUCTS:
            product = self._product(direction)
            curvature = _dot(direction, product)
            stuck = live & (curvature <= 0)
            if taken == 0 and start is None:
                solution[stuck] = direction[stuck]
            live &= ~stuck
            taken += 1
            rate = np.where(live, length / np.where(live, curvature, 1.0), 0.0)[:, None, None].astype(np.float32)
            solution += rate * direction
            residual -= rate * product
            live &= _dot(residual, residual) > target
            step = self._preconditioned(residual)
            before, length = length, _dot(residual, step)
            direction = step + np.where(live, length / before, 0.0)[:, None, None].astype(np.float32) * direction
        self._excess += max(0, taken - FEW)
        return solution.astype(np.float64)

    def _newton(self, rewards: np.ndarray | None, tolerance: float) -> int:
        """Takes all members to where the norm of their gradients is at most the tolerance; returns the steps taken."""
        value, gradient = self._losses(self._theta, rewards)
        for step in range(self._most):
            norm = float(np.sqrt(np.square(gradient).sum()))
            check_finite("the gradient's norm", norm)
            if norm <= tolerance:
                return step
            direction = self._solve(-gradient, None, STEP, 0.3 * tolerance / math.sqrt(len(gradient)))
            slope = _dot(gradient, direction)
            rate = np.ones(len(value))
            for _ in range(30):
                theta = self._theta + rate[:, None, None] * direction
                tried, tried_gradient = self._losses(theta, rewards)
                worse = ~(tried <= value + 1e-4 * rate * slope + ROUNDED * np.abs(value))
                if not worse.any():
                    break
                rate[worse] *= 0.5
            self._theta, before, value, gradient = theta, value, tried, tried_gradient
            if not (before - value > ROUNDED * np.abs(value)).any():
                return step + 1
        return self._most


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The members' inner products, (M,)."""
    return np.einsum("mcf,mcf->m", left, right)


def row_space(inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Inputs (N, F) in an orthonormal basis (F, N) of their rows if they are wider than N: no policy leaves it."""
    if inputs.shape[1] <= inputs.shape[0]:
        return inputs, None
    basis, coordinates = torch.linalg.qr(inputs.mT)
    return coordinates.mT, basis


def _in_basis(weights: Tensor, basis: Tensor | None) -> Tensor:
    return weights if basis is None else basis.mT @ weights


def _out_of_basis(weights: Tensor, basis: Tensor | None) -> Tensor:
    return weights if basis is None else basis @ weights


class Ridge(Members):
    """Linear Gaussian policies under -(ŷ-y)ᵀU(ŷ-y): see `Members`.

    With A and b the covariances of x with itself and with y, the weights B solve A B + (l2/2W) B U⁻¹ = b, U in units of
    y, which A's eigenvectors make one equation of D numbers for each of its eigenvalues. The spread is U⁻¹/2. All of it
    is differentiable, and so is the likelihood of the rows inside, from their second moments.

    Args:
        noise: variance that is added to y where the rows inside are judged.
    """

    policy: GaussianPolicy | FullStack

    def __init__(
        self, policy: GaussianPolicy | FullStack, rows: Rows, inside: Tensor, *, noise: float
    ) -> None:  # fmt: skip
        self.policy, self._noise = policy, noise
        inputs, self._basis = row_space(rows.inputs)
        columns = torch.cat([inputs, rows.target, torch.ones_like(rows.target[:, :1])], dim=1)
        everything, *parts = (columns.mT @ (each[:, None] * columns) for each in (rows.weight, *inside))
        outside = everything - torch.stack(parts)
        total = outside[:, -1:, -1:]
        self._inside, self._penalty = torch.stack(parts) / everything[-1, -1], 0.5 / total[..., None]
        self._mean = outside[:, -1:, :-1] / total
        covariance = outside[:, :-1, :-1] / total - self._mean.mT * self._mean
        self._features = inputs.shape[1]
        x, y = slice(self._features), slice(self._features, None)
        values, self._vectors = torch.linalg.eigh(covariance[:, x, x])
        # Without a penalty a direction that x does not have is left at nothing.
        self._values = values.clamp(min=SINGULAR)[:, :, None, None]
        self._target = self._vectors.mT @ covariance[:, x, y]

    def begin(self, l2: float) -> None:
        self._fit(0.5 * torch.eye(self._target.shape[2], dtype=torch.float64), torch.tensor(l2, dtype=torch.float64))

    def residual(self) -> Tensor:
        """Second moments of what the members leave of the rows inside, (D, D), in units of y."""
        weights = torch.cat([self._weights, self._bias], dim=1)
        here = torch.eye(weights.shape[2], dtype=torch.float64).expand(len(weights), -1, -1)
        cross = torch.cat([-weights[:, :-1].mT, here, -weights[:, -1:].mT], dim=2)
        return (cross @ self._inside @ cross.mT).sum(dim=0)

    def train(self, phi: Learned) -> int:
        with torch.no_grad():
            precision = self._precision(phi)
            self._fit(self._of_values(precision), phi.l2())
            network = network_of(self.policy)
            network.weights[0].copy_(in_units(_out_of_basis(self._weights, self._basis), network.unit))
            network.biases[0].copy_(in_units(self._bias, network.unit))
            set_covariance(self.policy, 0.5 * torch.linalg.inv(precision))
        return 0

    def evaluate(self, phi: Learned) -> tuple[float, Tensors]:
        with torch.enable_grad():
            precision = self._precision(phi)
            of_values = self._of_values(precision)
            self._fit(of_values, phi.l2())
            spread = self.residual() + self._noise * torch.eye(len(precision), dtype=torch.float64)
            loss = (of_values * spread).sum() - 0.5 * torch.logdet(precision / math.pi)
            return float(loss.detach()), torch.autograd.grad(loss, list(phi.parameters()))

    def keep(self) -> None:
        pass

    def _precision(self, phi: Learned) -> Tensor:
        return as_matrix(cast(MatrixReward, phi.reward).precision(), self._target.shape[2])

    def _of_values(self, precision: Tensor) -> Tensor:
        """U for y of one for outputs in their unit."""
        inverse = torch.linalg.inv(network_of(self.policy).unit)
        return inverse.mT @ precision @ inverse

    def _fit(self, precision: Tensor, l2: Tensor) -> None:
        curvature = self._values * precision + l2 * self._penalty * torch.eye(len(precision), dtype=torch.float64)
        rotated = torch.linalg.solve(curvature, (self._target @ precision)[..., None])[..., 0]
        self._weights = self._vectors @ rotated
        x, y = self._mean.split([self._features, len(precision)], dim=2)
        self._bias = y - x @ self._weights
