"""The errors that this package raises on purpose; the command line turns each into one line."""


class UsageError(ValueError):
    """An option or a file of the user's cannot be used: names it, what was expected and what came."""


class MissingDependencyError(ImportError):
    """An optional dependency is not installed: names the extra that brings it."""


class HypergradientWarning(UserWarning):
    """Hypergradients that the reward was moved along are less than they should be: says how many, why, what to do."""


class NonFiniteError(FloatingPointError):
    """A loss, a parameter or a gradient became infinite or not a number."""
