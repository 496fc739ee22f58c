"""The errors that this package raises on purpose; the command line turns each into one line."""


class UsageError(ValueError):
    """An option or a file of the user's cannot be used: names it, what was expected and what came.

    Example:
        >>> from pathlib import Path
        >>> from po_bilevel.language import read_text
        >>> try:
        ...     read_text(Path("nowhere.txt"))
        ... except UsageError as error:
        ...     print(error)
        nowhere.txt: expected a file of text, got No such file or directory
    """


class MissingDependencyError(ImportError):
    """An optional dependency is not installed: names the extra that brings it.

    Example:
        >>> issubclass(MissingDependencyError, ImportError)
        True
    """


class HypergradientWarning(UserWarning):
    """Hypergradients that the reward was moved along are less than they should be: says how many, why, what to do.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", HypergradientWarning)  # what warns inside ends
    """


class NonFiniteError(FloatingPointError):
    """A loss, a parameter or a gradient became infinite or not a number.

    Example:
        >>> import torch
        >>> policy, data = LinearGaussian(3, 2), Batch(torch.ones(5, 3), 1e30 * torch.ones(5, 2))
        >>> try:
        ...     train_nll(policy, data, torch.optim.SGD(policy.parameters(), lr=1.0), 2)
        ... except NonFiniteError:
        ...     print("stopped")
        stopped
    """
