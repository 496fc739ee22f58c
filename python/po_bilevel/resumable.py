"""Training that goes on: steps with a progress bar and callbacks, checkpoints, and exact resume."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoints, fingerprints, training
from .errors import HypergradientWarning, UsageError
from .optimizers import Together
from .processes import Processes
from .rewards import diagonal
from .steps import OuterStep, imperfect

Step = TypeVar("Step", bound=OuterStep)


class Resumable(ABC, Generic[Step]):
    """What trainers have in common.

    Attributes:
        history: of all steps so far.
    """

    # What the history is made of.
    step_type: ClassVar[type[Any]] = OuterStep
    _processes = Processes()

    def __init__(
        self, *, checkpoint: Path | str | None, checkpoint_every: int, progress: bool, description: str
    ) -> None:  # fmt: skip
        training.check_count("checkpoint_every", checkpoint_every, 1)
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        if self._checkpoint is not None and not self._checkpoint.parent.is_dir():
            raise ValueError(f"checkpoint: expected a file in a folder that exists, got {str(checkpoint)!r}")
        self._checkpoint_every = checkpoint_every
        self._good: str | None = None
        self._log: checkpoints.History | None = None
        self._progress = progress and self._processes.rank == 0
        self._description = description
        self.history: list[Step] = []

    @abstractmethod
    def step(self) -> Step:
        """One outer step; see `fit`."""

    @abstractmethod
    def _learned(self) -> Sequence[nn.Parameter]:
        """φ."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Where the run is, but for its history and the global generators."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""

    @property
    @abstractmethod
    def _configuration(self) -> dict[str, str]:
        """What has to be the same for a run to go on."""

    def fit(
        self, outer_steps: int, callback: Callable[[Step], Any] | Sequence[Callable[[Step], Any]] = (),
        *, keep_best: bool = False, patience: int | None = None, min_delta: float = 0.0,
        resume: Path | str | None = None,
    ) -> list[Step]:  # fmt: skip
        """Takes outer steps; calling it again goes on from there.

        Warns at its end, once, with a `HypergradientWarning` if hypergradients of these steps had not converged or met
        negative curvature.

        Args:
            outer_steps: the most to take; with `resume` it counts those before, too.
            callback: called after each, one or several; True from one of them, in any process, stops. See `callbacks`
                for TensorBoard and Weights & Biases.
            patience: stop after so many steps in a row whose outer loss did not fall below the least before; None for
                never.
            min_delta: by how much it has to fall below that to count.
            resume: go on from this checkpoint, as `resume` does, to `outer_steps` in all. If it is the file that this
                trainer writes to, it need not be there yet: the same script begins a run and goes on with it.
            keep_best: leave the reward at the end as it was where the outer loss was least in these steps. A
                checkpoint has it as the last step left it.

        Returns:
            the history of all steps so far.

        Raises:
            NonFiniteError: a loss, a gradient or a parameter is infinite or not a number; names the last good
                checkpoint.
            ValueError, RuntimeError: as the hypergradient method; keep_best without a reward that is learned, or an
                argument out of range.
            UsageError: as `resume`.
            OSError: the checkpoint cannot be written. The steps taken are in the history, the last checkpoint is as it
                was, and another call goes on.
        """
        training.check_loop(outer_steps, 0.0, patience, min_delta, None, prefix="outer_")
        waiting = training.Patience(patience, min_delta)
        if resume is not None:
            path = Path(resume)
            if self._processes.gather(path.exists())[0] or path != self._checkpoint:
                self.resume(path)
            outer_steps = max(0, outer_steps - len(self.history))
            if True in [waiting.over(step.outer_loss) for step in self.history]:
                outer_steps = 0
        callbacks = [callback] if callable(callback) else list(callback)
        phi = self._learned()
        if keep_best and not phi:
            raise ValueError("keep_best: expected False where no reward is learned, got True")
        best, least, stopped = [p.detach().clone() for p in phi], float("inf"), False
        first = len(self.history)
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
                asked = [each(done) is True for each in callbacks]
                stopped = self._processes.any(waiting.over(done.outer_loss) or True in asked)
                last = stopped or index == outer_steps - 1
                if self._checkpoint is not None and (last or len(self.history) % self._checkpoint_every == 0):
                    self.save(self._checkpoint)
                if stopped:
                    break
        if keep_best:
            with torch.no_grad():
                for parameter, value in zip(phi, best, strict=True):
                    parameter.copy_(value)
        if (problem := imperfect(self.history[first:])) and self._processes.rank == 0:
            warnings.warn(problem, HypergradientWarning, stacklevel=2)
        return self.history

    def save(self, path: Path) -> None:
        """Writes a checkpoint to go on from with `resume`.

        Of several processes, all of which call it, the first one writes.

        Raises:
            OSError: the folder cannot be written to, or is full; a checkpoint that was there is as it was.
        """
        path, whole, configuration = Path(path), self._whole(), self._compared
        problem: OSError | None = None
        if self._processes.rank == 0:
            try:
                self._write(path, whole, configuration)
            except OSError as error:
                problem = error
        # None goes on before the file is there.
        if (problem := self._processes.gather(problem)[0]) is not None:
            raise problem
        self._good = f"{path}, after {len(self.history)} outer steps"

    def _write(self, path: Path, whole: dict[str, Any], configuration: dict[str, str]) -> None:
        if self._log is None or self._log.checkpoint != path:
            self._log = checkpoints.History(path)
        self._log.add(self.history)
        checkpoints.save(path, whole | {"history": self._log.mark}, configuration)
        self._log.sweep()

    def resume(self, path: Path) -> list[Step]:
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
        state = checkpoints.load(path, self._compared)
        before = copy.deepcopy(self._whole())
        try:
            log, steps = checkpoints.History.open(path, state["history"])
            history = [self.step_type(**(step | {"problems": tuple(step["problems"])})) for step in steps]
            self._go_on(state)
        except UsageError:
            raise
        except Exception as error:
            self._go_on(before)
            raise UsageError(
                f"checkpoint: expected the state of such a trainer, got {str(path)!r}: {type(error).__name__}: {error}"
            ) from error
        self._log, self.history[:] = log, history
        self._good = f"{path}, after {len(self.history)} outer steps"
        unknown = [name for name, text in self._compared.items() if fingerprints.UNKNOWN in text]
        if unknown:
            warnings.warn(f"checkpoint: taken to be as they were: {', '.join(unknown)}", stacklevel=2)
        return self.history

    @property
    def _compared(self) -> dict[str, str]:
        """The first process's configuration: others may have data of their own."""
        number = self._processes.number
        return self._processes.gather(self._configuration)[0] | ({"processes": str(number)} if number > 1 else {})

    def _whole(self) -> dict[str, Any]:
        return self._state() | {"random": self._processes.gather(checkpoints.random_state())}

    def _go_on(self, state: dict[str, Any]) -> None:
        self._restore(state)
        checkpoints.set_random_state(state["random"][self._processes.rank])

    def _last_good(self) -> str:
        return "" if self._good is None else f"; the last good checkpoint is {self._good}"


def described(**parts: Any) -> dict[str, str]:
    """Parts of a configuration as text, see `fingerprints`."""
    return {key: text for name, part in parts.items() for key, text in fingerprints.describe(name, part).items()}


def named(module: nn.Module, names: Sequence[str]) -> tuple[nn.Parameter, ...]:
    """Parameters of a module by their names."""
    parameters = dict(module.named_parameters())
    return tuple(parameters[name] for name in names)


def learned_names(reward: nn.Module) -> list[str]:
    """Of the parameters that require grad, if there are any.

    Raises:
        ValueError: there are none.
    """
    names = [name for name, p in reward.named_parameters() if p.requires_grad]
    if not names:
        raise ValueError("reward: expected parameters that require grad, got none to learn")
    return names


def check_one_at_a_time(name: str, optimizer: torch.optim.Optimizer | Together) -> None:
    """Refuses an optimiser that asks for losses."""
    if any(isinstance(each, torch.optim.LBFGS) for each in getattr(optimizer, "each", [optimizer])):
        raise ValueError(f"{name}: expected one that takes a gradient at a time, got LBFGS")


def check_learned(policy: nn.Module, reward: nn.Module, outer_optimizer: torch.optim.Optimizer | Together) -> None:
    """Refuses an outer optimiser that would leave some of φ as it is or move something else, and a φ that is θ too."""
    training.check_optimizer("outer_optimizer", outer_optimizer)
    check_one_at_a_time("outer_optimizer", outer_optimizer)
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


def update_reward(
    phi: Sequence[nn.Parameter], gradient: Sequence[Tensor], optimizer: torch.optim.Optimizer | Together,
    max_norm: float | None,
) -> None:  # fmt: skip
    """One step of the outer optimiser along a hypergradient, which is scaled down where it is longer than max_norm."""
    for parameter, part in zip(phi, gradient, strict=True):
        parameter.grad = part
    if max_norm is not None:
        nn.utils.clip_grad_norm_(phi, max_norm)
    optimizer.step()


def _summary(step: OuterStep) -> str:
    """The losses, and the reward's parameters as far as they fit on a line."""
    text = f"inner {step.inner_loss:.4f}, outer {step.outer_loss:.4f}"
    if step.reward is not None:
        shown = diagonal(step.reward).tolist()
        text += ", reward " + " ".join(f"{value:.3g}" for value in shown[:6]) + (" …" if len(shown) > 6 else "")
    else:
        text += f", ‖φ‖ {step.reward_norm:.4g}"
    return text + ", not converged" if step.converged is False else text
