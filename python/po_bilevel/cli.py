"""The command line: `po-bilevel classify --dataset wine --seeds 10 --out DIR`, `po-bilevel sweep FILE`, ...

Exit codes: 0 done; 1 training diverged; 2 something about the command, a file or the installation is wrong;
130 interrupted. The functions of the commands raise, and `main` makes a line of that. What needs torch is imported once
a command is known to need it.
"""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import MissingDependencyError, NonFiniteError, UsageError
from .experiments.registry import EXPERIMENTS

PROGRAM = "po-bilevel"
# Commands that are no experiments, and where they are.
OTHERS = {
    "sweep": "experiments/sweep", "report": "experiments/report", "reproduce": "experiments/reproduce",
    "doctor": "doctor",
}  # fmt: skip
SHELLS = ("bash", "zsh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; `arguments` are those of the process if None."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if command in ("-h", "--help"):
            print(usage())
        elif command == "--version":
            from . import __version__

            print(f"{PROGRAM} {__version__}")
        elif command == "completion":
            print_completion(rest)
        elif command == "doctor" and not rest:
            from .doctor import examine

            print(examine(), flush=True)
        elif command in EXPERIMENTS or command in OTHERS:
            return _run(command, rest)
        else:
            return _fail(2, f"expected a command, got {command or 'none'}\n\n{usage()}")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2 * (error.code is not None)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except NonFiniteError as error:
        return _fail(1, str(error))
    except (UsageError, MissingDependencyError) as error:
        return _fail(2, str(error))
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter would complain once more on closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        return _fail(2, str(error) or "out of memory")
    except RuntimeError as error:
        # torch's word for a MemoryError, with lines of frames below.
        if not any(part in str(error) for part in ("allocate memory", "CUDA out of memory", "calculation overflowed")):
            raise
        return _fail(2, f"out of memory; smaller --hidden, --dim or the like may help: {str(error).splitlines()[0]}")
    return 0


def usage() -> str:
    """The commands, each with the first sentence of what its module says of itself."""
    lines = {name: _about(name) for name in (*EXPERIMENTS, *OTHERS)}
    lines["completion"] = f'Completion for {", ".join(SHELLS)}: eval "$({PROGRAM} completion bash)".'
    width = max(map(len, lines))
    return "\n".join([
        f"usage: {PROGRAM} COMMAND [OPTIONS]", "", "Learn rewards from data.", "",
        *(f"  {name:<{width}}  {about}" for name, about in lines.items()), "",
        f"{PROGRAM} COMMAND --help has the options of a command, {PROGRAM} --version the version.",
    ])  # fmt: skip


def print_completion(arguments: Sequence[str]) -> None:
    """Prints what makes a shell complete commands and their options."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UsageError(f"completion: expected one of {', '.join(SHELLS)}, got {' '.join(arguments) or 'none'}")
    import tyro

    from .experiments.commands import kind_of

    commands = {name: kind_of(name) for name in (*EXPERIMENTS, *OTHERS) if name != "doctor"}
    tyro.extras.subcommand_cli_from_dict(
        commands | {"doctor": _nothing}, prog=PROGRAM, args=["--tyro-print-completion", arguments[0]]
    )


def _nothing() -> None:
    """Say what is installed."""


def _run(command: str, arguments: Sequence[str]) -> int:
    import tyro

    from .experiments import commands

    def parsed(**default: Any) -> Any:
        name = f"{PROGRAM} {command}"
        return tyro.cli(commands.kind_of(command), prog=name, args=list(arguments), **default)

    config = parsed()
    if getattr(config, "config", None) is not None and command != "sweep":
        config = parsed(default=commands.from_file(command, config.config))
    return commands.start(command, config)


def _about(command: str) -> str:
    module = EXPERIMENTS.data[command] if command in EXPERIMENTS else OTHERS[command]
    if not isinstance(module, str):
        return module.config.__doc__ or ""
    folder = Path(__file__).parent / ("experiments" if command in EXPERIMENTS else "")
    text = ast.get_docstring(ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def _fail(code: int, message: str) -> int:
    print(f"{PROGRAM}: {'error: ' if code != 130 else ''}{message}", file=sys.stderr)
    return code
