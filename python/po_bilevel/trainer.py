"""Two levels: a reward learned through the policy that it leads to."""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from . import checkpoints, fingerprints, training
from .errors import NonFiniteError, UsageError
from .hypergradients import Hypergradient, HypergradientMethod, ImplicitCG, Tensors
from .hypergradients.sampled import SampledMethod
from .losses import Batch, NegativeLogLikelihood, PolicyGradient
from .objectives import sampled_objective
from .policies import Policy
from .rewards import MahalanobisReward, OneHotMahalanobisReward, Reward, TableReward, diagonal
from .substitution import Substitution, evaluating
from .threads import threads_for
from .training import BatchStream, InnerLoss, train, under

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
OuterLoss = Callable[[Policy, Batch], Tensor]
_REPEATABLE_REWARDS = (MahalanobisReward, OneHotMahalanobisReward, TableReward)


@dataclass(frozen=True)
class OuterStep:
    """What one outer step did; the losses and the reward are those before its update of the reward.

    Attributes:
        step: its number, from 0.
        inner_loss, outer_loss: L and F at the policy that the inner loop arrived at.
        inner_steps: optimiser steps taken on the policy.
        reward: `Reward.shown`; None of a module that is no `Reward`.
        reward_norm: ‖φ‖.
        gradient_norm: ‖dF/dφ‖.
        residual_norm, num_products, converged, negative_curvature, problems, inner_gradient_norm, stationarity: as in
            `Hypergradient`.
        native: the inner loop ran in native calls, see `train`, but for an optimiser's first step.
    """

    step: int
    inner_loss: float
    outer_loss: float
    inner_steps: int
    reward: Tensor | None
    reward_norm: float
    gradient_norm: float
    residual_norm: float | None
    num_products: int
    converged: bool | None
    negative_curvature: bool
    problems: tuple[str, ...]
    inner_gradient_norm: float | None = None
    stationarity: float | None = None
    native: bool = False


class BilevelTrainer:
    """Learns a reward: gradient steps on φ through the policy that each reward leads to.

    Each outer step trains the policy on from where it is (warm start), takes the hypergradient there, and lets the
    outer optimiser update the reward. The outer optimiser and the linear solve's start are kept across steps.

    The outer loss sees the policy in evaluation mode, the inner loss in the mode that it is in. Buffers, such as the
    statistics of BatchNorm, take in the rows of the inner loss, as often as the policy takes a step.

    Where a pass has fewer than 10⁷ multiplications, rows times parameters, PyTorch has one thread within a step.

    Args:
        policy: p_θ, trained in place.
        reward: r_φ, trained in place: those of its parameters that require grad.
        inner_data: rows of the inner loss.
        outer_data: rows of the outer loss. Rows that the inner loss does not see keep a policy that can memorise
            its data from passing for a sharp reward.
        inner_optimizer: makes the policy's optimiser from its parameters.
        outer_optimizer: of the reward's parameters that require grad; one that takes a gradient at a time, not LBFGS.
        inner_steps: the most optimiser steps on the policy for each outer step; 0 for a hypergradient method that
            moves θ itself, as `Unrolled` and `BOME` do.
        inner_loss: (policy, reward, batch, seed) -> ().
        outer_loss: (policy, batch) -> (); as it stands, `NegativeLogLikelihood()`.
        hypergradient: the method; `ImplicitCG()` as it stands.
        inner_tolerance, patience, min_delta, max_grad_norm: of the inner loop, see `train`.
        max_outer_grad_norm: longer hypergradients are scaled to this Euclidean norm; None leaves them. Those of an
            untrained policy can be so long that an adaptive optimiser's averages remember little else.
        inner_scheduler: makes the inner loop's scheduler from the policy's optimiser, anew at each outer step, which
            starts from the optimiser's first learning rates: each is a problem of its own.
        outer_scheduler: of the outer optimiser's learning rates, stepped after each outer step; `ReduceLROnPlateau` is
            given the outer loss.
        keep_inner_state: keep the policy's optimiser from one outer step to the next. Quasi-Newton methods should
            not: what they remember of the curvature belongs to the reward of before.
        batch_size: rows of a batch of the inner loss; None for all. The outer loss reads all its rows.
        seed: of batches and samples.
        checkpoint: file that `fit` writes, in a folder that exists, for `resume`; None for none. Whole or as it was
            before, never in between. The history is beside it, in a file of that name and eight characters and
            ".history": copy both.
        checkpoint_every: outer steps between two writes.
        progress: False for no progress bar. With True there is one if standard error is a terminal.
        description: the label of the progress bar.

    Raises:
        ValueError: a reward without parameters to learn, an outer optimiser of other parameters than those, parameters
            that are the policy's and the reward's, or an argument out of range.
    """

    def __init__(
        self, policy: Policy, reward: nn.Module, *, inner_data: Batch, outer_data: Batch,
        inner_optimizer: OptimizerFactory, outer_optimizer: Optimizer, inner_steps: int,
        inner_loss: InnerLoss | None = None, outer_loss: OuterLoss | None = None,
        hypergradient: HypergradientMethod | None = None, inner_tolerance: float = 0.0, patience: int | None = None,
        min_delta: float = 0.0, max_grad_norm: float | None = None, max_outer_grad_norm: float | None = None,
        inner_scheduler: SchedulerFactory | None = None, outer_scheduler: LRScheduler | None = None,
        keep_inner_state: bool = True, batch_size: int | None = None, seed: int = 0,
        checkpoint: Path | str | None = None, checkpoint_every: int = 1, progress: bool = True,
        description: str = "outer steps",
    ) -> None:  # fmt: skip
        training.check_loop(inner_steps, inner_tolerance, patience, min_delta, max_grad_norm, prefix="inner_")
        training.check_norm("max_outer_grad_norm", max_outer_grad_norm)
        training.check_count("checkpoint_every", checkpoint_every, 1)
        self.policy = policy
        self.reward = reward
        self._phi = [name for name, p in reward.named_parameters() if p.requires_grad]
        if not self._phi:
            raise ValueError("reward: expected parameters that require grad, got none to learn")
        self._theta = [name for name, p in policy.named_parameters() if p.requires_grad]
        _check_parameters(policy, reward, outer_optimizer)
        self._stream = BatchStream(inner_data, batch_size, seed)
        self._inner_data = inner_data
        self._outer_data = outer_data.check("outer_data")
        self._inner_optimizer = inner_optimizer
        self._outer_optimizer = outer_optimizer
        self._inner_steps = inner_steps
        self._inner_loss: InnerLoss = PolicyGradient() if inner_loss is None else inner_loss
        self._outer_loss: OuterLoss = NegativeLogLikelihood() if outer_loss is None else outer_loss
        self._hypergradient: HypergradientMethod = ImplicitCG() if hypergradient is None else hypergradient
        self._loop = {
            "tolerance": inner_tolerance, "patience": patience, "min_delta": min_delta, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        self._max_outer_grad_norm = max_outer_grad_norm
        self._inner_scheduler = inner_scheduler
        self._outer_scheduler = outer_scheduler
        self._sampling = {"batch_size": batch_size, "seed": seed}
        # Before they take a step.
        self._start = _described(
            outer_optimizer=outer_optimizer, outer_scheduler=outer_scheduler, inner_loss=self._inner_loss,
            outer_loss=self._outer_loss, hypergradient=self._hypergradient,
        )  # fmt: skip
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        if self._checkpoint is not None and not self._checkpoint.parent.is_dir():
            raise ValueError(f"checkpoint: expected a file in a folder that exists, got {str(checkpoint)!r}")
        self._checkpoint_every = checkpoint_every
        self._good: str | None = None
        self._log: checkpoints.History | None = None
        self._keep_inner_state = keep_inner_state
        self._progress = progress
        self._description = description
        self._optimizer: Optimizer | None = None
        self._solution: Tensors | None = None
        self.history: list[OuterStep] = []

    def fit(
        self, outer_steps: int, callback: Callable[[OuterStep], Any] | Sequence[Callable[[OuterStep], Any]] = (),
        *, keep_best: bool = False,
    ) -> list[OuterStep]:  # fmt: skip
        """Takes outer steps; calling it again goes on from there.

        Args:
            outer_steps: the most to take.
            callback: called after each, one or several; True from one of them stops. See `callbacks` for TensorBoard
                and Weights & Biases.
            keep_best: leave the reward at the end as it was where the outer loss was least in these steps. A
                checkpoint has it as the last step left it.

        Returns:
            the history of all steps so far.

        Raises:
            NonFiniteError: a loss, a gradient or a parameter is infinite or not a number; names the last good
                checkpoint.
            ValueError, RuntimeError: as the hypergradient method.
            OSError: the checkpoint cannot be written. The steps taken are in the history, the last checkpoint is as it
                was, and another call goes on.
        """
        training.check_count("outer_steps", outer_steps, 0)
        callbacks = [callback] if callable(callback) else list(callback)
        phi = _named(self.reward, self._phi)
        best, least, stopped = [p.detach().clone() for p in phi], float("inf"), False
        # disable=None is tqdm's own test for a terminal.
        with tqdm(
            total=outer_steps, desc=self._description, disable=None if self._progress else True, leave=False
        ) as bar:
            for index in range(outer_steps):
                before = [p.detach().clone() for p in phi] if keep_best else []
                done = self.step()
                if done.outer_loss < least:
                    best, least = before, done.outer_loss
                bar.set_postfix_str(_summary(done), refresh=False)
                bar.update()
                stopped = True in [each(done) is True for each in callbacks]
                last = stopped or index == outer_steps - 1
                if self._checkpoint is not None and (last or len(self.history) % self._checkpoint_every == 0):
                    self.save(self._checkpoint)
                if stopped:
                    break
        if keep_best:
            with torch.no_grad():
                for parameter, value in zip(phi, best, strict=True):
                    parameter.copy_(value)
        return self.history

    def save(self, path: Path) -> None:
        """Writes a checkpoint to go on from with `resume`.

        Raises:
            OSError: the folder cannot be written to, or is full; a checkpoint that was there is as it was.
        """
        path = Path(path)
        if self._log is None or self._log.checkpoint != path:
            self._log = checkpoints.History(path)
        self._log.add(self.history)
        checkpoints.save(path, self._state() | {"history": self._log.mark}, self._configuration)
        self._log.sweep()
        self._good = f"{path}, after {len(self.history)} outer steps"

    def _state(self) -> dict[str, Any]:
        """Where the run is, but for its history."""
        return {
            "policy": self.policy.state_dict(),
            "reward": self.reward.state_dict(),
            "inner_optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "outer_optimizer": self._outer_optimizer.state_dict(),
            "outer_scheduler": None if self._outer_scheduler is None else self._outer_scheduler.state_dict(),
            "stream": self._stream.state(),
            "solution": self._solution,
            "random": checkpoints.random_state(),
        }

    def resume(self, path: Path) -> list[OuterStep]:
        """Goes on from a checkpoint of a trainer that was made with the same arguments, to the bit.

        The states of Python's, NumPy's and torch's global random number generators are those of then, too. Warns of
        arguments that cannot be compared, such as objects whose contents Python does not show.

        Returns:
            the history up to there.

        Raises:
            UsageError: there is no such file, it is no checkpoint, it or its history has changed, or the arguments
                differ: says which. The trainer is as it was.
        """
        path = Path(path)
        state = checkpoints.load(path, self._configuration)
        before = copy.deepcopy(self._state())
        try:
            log, steps = checkpoints.History.open(path, state["history"])
            history = [OuterStep(**(step | {"problems": tuple(step["problems"])})) for step in steps]
            self._restore(state)
        except UsageError:
            raise
        except Exception as error:
            self._restore(before)
            raise UsageError(
                f"checkpoint: expected the state of such a trainer, got {str(path)!r}: {type(error).__name__}: {error}"
            ) from error
        self._log, self.history[:] = log, history
        self._good = f"{path}, after {len(self.history)} outer steps"
        unknown = [name for name, text in self._configuration.items() if fingerprints.UNKNOWN in text]
        if unknown:
            warnings.warn(f"checkpoint: taken to be as they were: {', '.join(unknown)}", stacklevel=2)
        return self.history

    def _restore(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.reward.load_state_dict(state["reward"])
        self._outer_optimizer.load_state_dict(state["outer_optimizer"])
        if self._outer_scheduler is not None:
            self._outer_scheduler.load_state_dict(state["outer_scheduler"])
        self._optimizer = None
        if state["inner_optimizer"] is not None:
            self._optimizer = self._new_optimizer()
            self._optimizer.load_state_dict(state["inner_optimizer"])
        self._stream.restore(state["stream"])
        self._solution = state["solution"]
        checkpoints.set_random_state(state["random"])

    @functools.cached_property
    def _configuration(self) -> dict[str, str]:
        """Read once, for it reads all data."""
        inner = self._new_optimizer()
        return self._start | _described(**{
            "policy": self.policy, "trained": tuple(self._theta), "reward": self.reward, "learned": tuple(self._phi),
            "inner_data": self._inner_data, "outer_data": self._outer_data, "inner_optimizer": inner,
            "inner_steps": self._inner_steps, **self._loop, "max_outer_grad_norm": self._max_outer_grad_norm,
            "inner_scheduler": None if self._inner_scheduler is None else self._inner_scheduler(inner),
            "keep_inner_state": self._keep_inner_state, **self._sampling,
        })  # fmt: skip

    def step(self) -> OuterStep:
        """One outer step; see `fit`."""
        done, result = self._evaluated()
        phi = _named(self.reward, self._phi)
        self._update_reward(phi, result)
        norm = training.norm_of([p.detach() for p in phi])
        training.check_finite(f"outer step {done.step}: the norm of the reward's parameters", norm, self._last_good())
        self.history.append(done)
        return done

    def evaluate(self) -> tuple[OuterStep, Tensors]:
        """An outer step without its update of the reward, for optimisers that choose the next reward themselves.

        The history stays as it is; the policy is trained, and the next solve starts from this one.

        Returns:
            what the step would be in the history, and dF/dφ, a tensor for each of the reward's parameters that require
            grad.

        Raises:
            NonFiniteError, ValueError, RuntimeError: as `fit`.
        """
        done, result = self._evaluated()
        return done, result.gradient

    def _evaluated(self) -> tuple[OuterStep, Hypergradient]:
        number = len(self.history)
        rows = len(self._inner_data.inputs) if self._sampling["batch_size"] is None else self._sampling["batch_size"]
        work = rows * sum(p.numel() for p in self.policy.parameters())
        try:
            with threads_for(work):
                inner_steps, native = self._train_policy()
                result = self._take_hypergradient()
        except NonFiniteError as error:
            raise NonFiniteError(f"outer step {number}: {error}{self._last_good()}") from error
        phi = _named(self.reward, self._phi)
        step = OuterStep(
            step=number, inner_loss=result.inner_loss, outer_loss=result.outer_loss, inner_steps=inner_steps,
            reward=self.reward.shown() if isinstance(self.reward, Reward) else None,
            reward_norm=training.norm_of([p.detach() for p in phi]), gradient_norm=training.norm_of(result.gradient),
            residual_norm=result.residual_norm, num_products=result.num_products, converged=result.converged,
            negative_curvature=result.negative_curvature, problems=result.problems,
            inner_gradient_norm=result.inner_gradient_norm, stationarity=result.stationarity, native=native,
        )  # fmt: skip
        return step, result

    def _take_hypergradient(self) -> Hypergradient:
        """The hypergradient where the policy is, which moves if the method moves it."""
        theta, phi = _named(self.policy, self._theta), _named(self.reward, self._phi)
        substituted = Substitution(self.policy, self._theta, self.reward, self._phi)
        # One batch and one seed for everything the method evaluates.
        batch, seed = self._stream.next()

        def inner(theta: Tensors, phi: Tensors) -> Tensor:
            return substituted(theta, phi, self._inner_loss, self.policy, self.reward, batch, seed)

        def outer(theta: Tensors, phi: Tensors) -> Tensor:
            with evaluating(self.policy):
                return substituted(theta, phi, self._outer_loss, self.policy, self._outer_data)

        if self.policy.fused_network() is not None and type(self.reward) in _REPEATABLE_REWARDS:
            # Linear layers, and losses that are given their seed: nothing is drawn.
            inner.repeatable = type(self._inner_loss) is PolicyGradient  # type: ignore[attr-defined]
            outer.repeatable = type(self._outer_loss) is NegativeLogLikelihood  # type: ignore[attr-defined]
        problem: Any = inner
        if isinstance(self._hypergradient, SampledMethod):
            problem = sampled_objective(
                self.policy, self.reward, self._inner_loss, batch, seed, substituted, theta, phi
            )  # fmt: skip
        result = self._hypergradient(problem, outer, theta, phi, start=self._solution)
        if result.theta is not None:
            with torch.no_grad():
                for parameter, value in zip(theta, result.theta, strict=True):
                    parameter.copy_(value)
                if self._inner_steps == 0 and any(True for _ in self.policy.buffers()):
                    self._inner_loss(self.policy, self.reward, batch, seed)
        elif self._inner_steps == 0:
            raise ValueError(
                f"inner_steps: expected at least 1 with {type(self._hypergradient).__name__}, which leaves the policy "
                "where it is, got 0"
            )
        self._solution = result.solution
        return result

    def _update_reward(self, phi: Tensors, result: Hypergradient) -> None:
        for parameter, gradient in zip(phi, result.gradient, strict=True):
            parameter.grad = gradient
        if self._max_outer_grad_norm is not None:
            nn.utils.clip_grad_norm_(phi, self._max_outer_grad_norm)
        self._outer_optimizer.step()
        if self._outer_scheduler is not None:
            training.advance(self._outer_scheduler, result.outer_loss)

    def _last_good(self) -> str:
        return "" if self._good is None else f"; the last good checkpoint is {self._good}"

    def _new_optimizer(self) -> Optimizer:
        return self._inner_optimizer(list(_named(self.policy, self._theta)))

    def _train_policy(self) -> tuple[int, bool]:
        """Takes inner steps; returns how many, and whether native calls took them."""
        if self._inner_steps == 0:
            return 0, False
        if self._optimizer is None or not self._keep_inner_state:
            self._optimizer = self._new_optimizer()
        scheduler = None
        if self._inner_scheduler is not None:
            for group in self._optimizer.param_groups:
                # Set by the first scheduler of an optimiser, and what every scheduler starts from.
                group["lr"] = group.get("initial_lr", group["lr"])
                group["initial_lr"] = group["lr"]
            scheduler = self._inner_scheduler(self._optimizer)
        with under(self.reward, self._inner_loss) as loss:
            norm = self._loop["max_grad_norm"]
            native = training.native_steps(self.policy, loss, self._inner_data, self._optimizer, norm)
            # The first step is torch's where the optimiser has no state yet.
            at_once = native is not None and native.ready()
            _, steps = train(
                self.policy, loss, self._stream, self._optimizer, self._inner_steps, scheduler=scheduler,
                **self._loop,  # type: ignore[arg-type]
            )  # fmt: skip
        return steps, native is not None and native.ready() and (at_once or steps > 1)


def _check_parameters(policy: nn.Module, reward: nn.Module, outer_optimizer: Optimizer) -> None:
    """Refuses an outer optimiser that would leave some of φ as it is or move something else, and a φ that is θ too."""
    if isinstance(outer_optimizer, torch.optim.LBFGS):
        raise ValueError("outer_optimizer: expected one that takes a gradient at a time, got LBFGS")
    moved = {id(p) for p in training.trained(outer_optimizer)}
    phi = {id(p): name for name, p in reward.named_parameters() if p.requires_grad}
    if moved != set(phi):
        missing = [name for key, name in phi.items() if key not in moved]
        raise ValueError(
            "outer_optimizer: expected the reward's parameters that require grad, got one that "
            + (f"lacks {', '.join(missing)}" if missing else f"has {len(moved - set(phi))} others too")
        )
    for name, parameter in policy.named_parameters():
        if id(parameter) in phi:
            raise ValueError(
                f"reward: expected parameters of its own, got {phi[id(parameter)]}, which is the policy's {name} too"
            )


def _described(**parts: Any) -> dict[str, str]:
    return {key: text for name, part in parts.items() for key, text in fingerprints.describe(name, part).items()}


def _named(module: nn.Module, names: Sequence[str]) -> tuple[nn.Parameter, ...]:
    parameters = dict(module.named_parameters())
    return tuple(parameters[name] for name in names)


def _summary(step: OuterStep) -> str:
    """The losses, and the reward's parameters as far as they fit on a line."""
    text = f"inner {step.inner_loss:.4f}, outer {step.outer_loss:.4f}"
    if step.reward is not None:
        shown = diagonal(step.reward).tolist()
        text += ", reward " + " ".join(f"{value:.3g}" for value in shown[:6]) + (" …" if len(shown) > 6 else "")
    else:
        text += f", ‖φ‖ {step.reward_norm:.4g}"
    return text + ", not converged" if step.converged is False else text
