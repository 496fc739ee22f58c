"""Two levels: a reward learned through the policy that it leads to."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from . import training
from .errors import NonFiniteError
from .hypergradients import Hypergradient, HypergradientMethod, ImplicitCG, Minibatches, Tensors
from .hypergradients.sampled import SampledMethod
from .losses import Batch, NegativeLogLikelihood, PolicyGradient
from .objectives import sampled_objective
from .optimizers import Together
from .passes import Passes, Share
from .policies import Policy
from .processes import Processes, device_of, unwrapped
from .resumable import Resumable, check_learned, described, learned_names, named, update_reward
from .rewards import MahalanobisReward, OneHotMahalanobisReward, TableReward
from .steps import OuterStep
from .streams import BatchStream, stream_of
from .substitution import Substitution, evaluating
from .threads import threads_for
from .training import InnerLoss, train, under

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
OuterLoss = Callable[[Policy, Batch], Tensor]
_REPEATABLE_REWARDS = (MahalanobisReward, OneHotMahalanobisReward, TableReward)


class BilevelTrainer(Resumable[OuterStep]):
    """Learns a reward: gradient steps on φ through the policy that each reward leads to.

    Each outer step trains the policy on from where it is (warm start), takes the hypergradient there, and lets the
    outer optimiser update the reward. The outer optimiser and the linear solve's start are kept across steps.

    The outer loss sees the policy in evaluation mode, the inner loss in the mode that it is in. Buffers, such as the
    statistics of BatchNorm, take in the rows of the inner loss, each time that some pass in a step.

    Where a pass has fewer than 10⁷ multiplications, rows times parameters, PyTorch has one thread within a step.

    Args:
        policy: p_θ, trained in place; or one in `DistributedDataParallel`, with the same arguments in each of its
            processes, which share the rows of the batches of both losses out among them, draw samples of their own, and
            exchange averages: once a step, and once a product with the Hessian for each batch of it.
        reward: r_φ, trained in place: those of its parameters that require grad.
        inner_data: rows of the inner loss; or a `DataLoader` that gives (inputs, target), of which each step and each
            hypergradient takes the next batches, moved to the policy's device. Of several processes each has a loader
            of its own rows, as with `DistributedSampler`.
        outer_data: rows of the outer loss; or a loader, of which each outer step takes the next batch. Rows that the
            inner loss does not see keep a policy that can memorise its data from passing for a sharp reward.
        inner_optimizer: makes the policy's optimiser from its parameters.
        outer_optimizer: of the reward's parameters that require grad; one that takes a gradient at a time, not LBFGS. A
            sequence of them is for groups of φ with optimisers of their own.
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
        outer_scheduler: of the outer optimiser's learning rates, or of those of one of them, stepped after each outer
            step; `ReduceLROnPlateau` is given the outer loss.
        keep_inner_state: keep the policy's optimiser from one outer step to the next. Quasi-Newton methods should
            not: what they remember of the curvature belongs to the reward of before.
        batch_size: rows of a batch of the inner loss; None for all.
        outer_batch_size: rows of the outer loss in each outer step; None for all.
        product_batches: how many batches of the inner loss a hypergradient averages its products over, one at a time
            in memory, see `Minibatches`; they are drawn apart from those of the inner steps.
        autocast: of the inner steps, see `train`. Hypergradients are computed in the parameters' own type: two or three
            digits of products would not do. `fit` in a `torch.autocast` of yours has both in it.
        accumulation: parts that a process splits a batch of either loss into, one after another, which saves memory; a
            hypergradient averages its products over them, as over `product_batches`. Methods that unroll, or take
            samples, have all of them at once.
        compile: compile the policy for the inner steps, as its `compile()` does, and leave it so. Hypergradients run
            what is compiled eagerly, for torch has no second derivative of it; native calls take their steps anyway.
        seed: of batches and samples.
        checkpoint: file that `fit` writes, in a folder that exists, for `resume`; None for none. Whole or as it was
            before, never in between. The history is beside it, in a file of that name and eight characters and
            ".history": copy both. Of several processes the first one writes.
        checkpoint_every: outer steps between two writes.
        progress: False for no progress bar. With True there is one if standard error is a terminal.
        description: the label of the progress bar.

    Raises:
        ValueError: a reward without parameters to learn, an outer optimiser of other parameters than those, parameters
            that are the policy's and the reward's, data that do not fit the policy, several product batches for a
            method of samples, which would not use them, or an argument out of range.
        TypeError: a policy of another class, data that are no `Batch` of tensors and no loader of them, or an optimiser
            that is none.
    """

    def __init__(
        self, policy: nn.Module, reward: nn.Module, *, inner_data: Batch | DataLoader[Any],
        outer_data: Batch | DataLoader[Any],
        inner_optimizer: OptimizerFactory, outer_optimizer: Optimizer | Sequence[Optimizer], inner_steps: int,
        inner_loss: InnerLoss | None = None, outer_loss: OuterLoss | None = None,
        hypergradient: HypergradientMethod | None = None, inner_tolerance: float = 0.0, patience: int | None = None,
        min_delta: float = 0.0, max_grad_norm: float | None = None, max_outer_grad_norm: float | None = None,
        inner_scheduler: SchedulerFactory | None = None, outer_scheduler: LRScheduler | None = None,
        keep_inner_state: bool = True, batch_size: int | None = None, outer_batch_size: int | None = None,
        product_batches: int = 1, autocast: torch.dtype | None = None, accumulation: int = 1, compile: bool = False,
        seed: int = 0, checkpoint: Path | str | None = None, checkpoint_every: int = 1, progress: bool = True,
        description: str = "outer steps",
    ) -> None:  # fmt: skip
        training.check_loop(inner_steps, inner_tolerance, patience, min_delta, max_grad_norm, prefix="inner_")
        training.check_norm("max_outer_grad_norm", max_outer_grad_norm)
        self.policy: Policy = unwrapped(policy, Policy)  # type: ignore[type-abstract]
        self.reward = reward
        self._parallel, self._processes = policy, Processes.of(policy)
        if isinstance(outer_optimizer, Sequence):
            self._outer_optimizer: Optimizer | Together = Together("outer_optimizer", outer_optimizer)
        else:
            self._outer_optimizer = outer_optimizer
        self._phi = learned_names(reward)
        self._theta = [name for name, p in self.policy.named_parameters() if p.requires_grad]
        check_learned(self.policy, reward, self._outer_optimizer)
        if not callable(inner_optimizer):
            raise TypeError(
                "inner_optimizer: expected a function that makes an optimiser of parameters, such as lambda p: "
                f"torch.optim.Adam(p), got {type(inner_optimizer).__name__}"
            )
        device = device_of(self.policy)
        self._stream = stream_of("inner_data", inner_data, batch_size, seed, device)
        self._outer_stream = stream_of("outer_data", outer_data, outer_batch_size, seed + 1, device)
        self._stream.data.check_for(self.policy, "inner_data")
        self._outer_stream.data.check_for(self.policy, "outer_data")
        self._passes = Passes(self._processes, device, autocast, accumulation)
        training.check_count("product_batches", product_batches, 1)
        self._product_batches = product_batches
        self._inner_optimizer = inner_optimizer
        self._inner_steps = inner_steps
        self._inner_loss: InnerLoss = PolicyGradient() if inner_loss is None else inner_loss
        self._outer_loss: OuterLoss = NegativeLogLikelihood() if outer_loss is None else outer_loss
        self._hypergradient: HypergradientMethod = ImplicitCG() if hypergradient is None else hypergradient
        if isinstance(self._hypergradient, SampledMethod) and product_batches > 1:
            raise ValueError(
                f"product_batches: expected 1 with {type(self._hypergradient).__name__}, whose samples are of one "
                f"batch, got {product_batches}"
            )
        self._loop = {
            "tolerance": inner_tolerance, "patience": patience, "min_delta": min_delta, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        self._max_outer_grad_norm = max_outer_grad_norm
        self._inner_scheduler = inner_scheduler
        self._outer_scheduler = outer_scheduler
        self._sampling: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
        # As they stand they are no part of what a checkpoint remembers, as before there were any.
        self._sampling |= {"outer_batch_size": outer_batch_size} if outer_batch_size is not None else {}
        self._sampling |= {"product_batches": product_batches} if product_batches > 1 else {}
        self._sampling |= {} if autocast is None else {"autocast": str(autocast)}
        self._sampling |= {"accumulation": accumulation} if accumulation > 1 else {}
        self._sampling |= {"compile": True} if compile else {}
        if compile:
            self.policy.compile()
        # As `DistributedDataParallel` has made the policy.
        self._processes.equal(reward)
        for name, stream in (("inner_data", self._stream), ("outer_data", self._outer_stream)):
            if self._processes.number > 1 and not stream.own:
                found = self._processes.gather(str(described(rows=stream.source)))
                if len(set(found)) > 1:
                    raise ValueError(
                        f"{name}: expected the same rows in each process, which share them out, got others; a "
                        "DataLoader in each gives rows of its own"
                    )
        # Before they take a step.
        self._start = described(
            outer_optimizer=self._outer_optimizer, outer_scheduler=outer_scheduler, inner_loss=self._inner_loss,
            outer_loss=self._outer_loss, hypergradient=self._hypergradient,
        )  # fmt: skip
        self._keep_inner_state = keep_inner_state
        self._optimizer: Optimizer | None = None
        self._solution: Tensors | None = None
        super().__init__(
            checkpoint=checkpoint, checkpoint_every=checkpoint_every, progress=progress, description=description
        )

    def _learned(self) -> tuple[nn.Parameter, ...]:
        return named(self.reward, self._phi)

    def _state(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "reward": self.reward.state_dict(),
            "inner_optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "outer_optimizer": self._outer_optimizer.state_dict(),
            "outer_scheduler": None if self._outer_scheduler is None else self._outer_scheduler.state_dict(),
            "stream": self._stream.state(),
            "solution": self._solution,
            "outer_stream": self._outer_stream.state(),
            "scaler": None if self._passes.scaler is None else self._passes.scaler.state_dict(),
        }

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
        if self._passes.scaler is not None:
            self._passes.scaler.load_state_dict(state["scaler"])
        self._stream.restore(state["stream"])
        self._solution = state["solution"]
        self._outer_stream.restore(state["outer_stream"])

    @functools.cached_property
    def _configuration(self) -> dict[str, str]:
        """Read once, for it reads all data."""
        inner = self._new_optimizer()
        return self._start | described(**{
            "policy": self.policy, "trained": tuple(self._theta), "reward": self.reward, "learned": tuple(self._phi),
            "inner_data": self._stream.source, "outer_data": self._outer_stream.source, "inner_optimizer": inner,
            "inner_steps": self._inner_steps, **self._loop, "max_outer_grad_norm": self._max_outer_grad_norm,
            "inner_scheduler": None if self._inner_scheduler is None else self._inner_scheduler(inner),
            "keep_inner_state": self._keep_inner_state, **self._sampling,
        })  # fmt: skip

    def step(self) -> OuterStep:
        """One outer step; see `fit`."""
        done, result = self._evaluated()
        phi = self._learned()
        update_reward(phi, result.gradient, self._outer_optimizer, self._max_outer_grad_norm)
        if self._outer_scheduler is not None:
            training.advance(self._outer_scheduler, result.outer_loss)
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
        rows = self._sampling["batch_size"] or len(self._stream.data.inputs)
        work = rows * sum(p.numel() for p in self.policy.parameters()) // self._processes.number
        try:
            with threads_for(work):
                inner_steps, native = self._train_policy()
                result = self._take_hypergradient()
        except NonFiniteError as error:
            raise NonFiniteError(f"outer step {number}: {error}{self._last_good()}") from error
        step = OuterStep.of(number, result, self.reward, inner_steps=inner_steps, native=native)
        return step, result

    def _take_hypergradient(self) -> Hypergradient:
        """The hypergradient where the policy is, which moves if the method moves it."""
        theta, phi = named(self.policy, self._theta), named(self.reward, self._phi)
        substituted = Substitution(self.policy, self._theta, self.reward, self._phi)
        # The same batches and seeds for everything the method evaluates, and drawn apart from those of the inner steps.
        drawn = [self._stream.next() for _ in range(self._product_batches)]
        parts = [share for batch, seed in drawn for share in self._passes.shares(batch, seed, own=self._stream.own)]
        outer_parts = self._passes.shares(*self._outer_stream.next(), own=self._outer_stream.own)

        def of(theta: Tensors, phi: Tensors, share: Share, function: Any, *arguments: object) -> Tensor:
            theta, phi = self._processes.shared(theta), self._processes.shared(phi)
            loss = substituted(theta, phi, function, *arguments)
            return self._processes.mean_loss(loss if share.weight == 1.0 else share.weight * loss)

        def inner(theta: Tensors, phi: Tensors, share: Share = parts[0]) -> Tensor:
            return of(theta, phi, share, self._inner_loss, self.policy, self.reward, share.batch, share.seed)

        def outer(theta: Tensors, phi: Tensors, share: Share = outer_parts[0]) -> Tensor:
            with evaluating(self.policy):
                return of(theta, phi, share, self._outer_loss, self.policy, share.batch)

        if self.policy.fused_network() is not None and type(self.reward) in _REPEATABLE_REWARDS:
            # Linear layers, and losses that are given their seed: nothing is drawn.
            inner.repeatable = type(self._inner_loss) is PolicyGradient  # type: ignore[attr-defined]
            outer.repeatable = type(self._outer_loss) is NegativeLogLikelihood  # type: ignore[attr-defined]
        problem: Any = inner if len(parts) == 1 else Minibatches(inner, parts)
        outer_problem: Any = outer if len(outer_parts) == 1 else Minibatches(outer, outer_parts)
        if isinstance(self._hypergradient, SampledMethod):
            if not self._stream.own and len(drawn[0][0].inputs) < self._processes.number:
                raise ValueError(
                    f"batch_size: expected at least a row for each of {self._processes.number} processes with "
                    f"{type(self._hypergradient).__name__}, got {len(drawn[0][0].inputs)}"
                )
            [share] = Passes(self._processes, device_of(self.policy)).shares(*drawn[0], own=self._stream.own)
            problem = sampled_objective(
                self.policy, self.reward, self._inner_loss, share.batch, share.seed, substituted, theta, phi,
                self._processes.average,
            )  # fmt: skip
        self._processes.equal(self.policy, parameters=False)
        with self._same_numbers(drawn[0][1]):
            result = self._hypergradient(problem, outer_problem, theta, phi, start=self._solution)
        if result.theta is not None:
            with torch.no_grad():
                for parameter, value in zip(theta, result.theta, strict=True):
                    parameter.copy_(value)
                if self._inner_steps == 0 and any(True for _ in self.policy.buffers()):
                    self._inner_loss(self.policy, self.reward, *drawn[0])
        elif self._inner_steps == 0:
            raise ValueError(
                f"inner_steps: expected at least 1 with {type(self._hypergradient).__name__}, which leaves the policy "
                "where it is, got 0"
            )
        self._solution = result.solution
        return result

    def _same_numbers(self, seed: int) -> contextlib.AbstractContextManager[Any]:
        """torch's default generators give several processes the same inside, which a method may draw from."""
        if self._processes.number == 1:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        device = device_of(self.policy)
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        return stack

    def _new_optimizer(self) -> Optimizer:
        return self._inner_optimizer(list(named(self.policy, self._theta)))

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
            native = None
            if self._passes.plain and isinstance(self._stream, BatchStream):
                native = training.native_steps(self.policy, loss, self._stream.data, self._optimizer, norm)
            # The first step is torch's where the optimiser has no state yet.
            at_once = native is not None and native.ready()
            _, steps = train(
                self._parallel, loss, self._stream, self._optimizer, self._inner_steps, scheduler=scheduler,
                **self._loop, **self._passes.options,  # type: ignore[arg-type]
            )  # fmt: skip
        return steps, native is not None and native.ready() and (at_once or steps > 1)
