"""The commands: they read arguments, call the library and print; no logic.

`parser.py` lists them; each has its arguments, its body and its help in one place, in the file of its group.
"""

import os
import sys
from collections.abc import Sequence

from gigatrain.cli import parser
from gigatrain.errors import GigatrainError, PlanError, RecipeError, SiteError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's error is one message and the exit code of its kind, never a traceback."""
    options = parser.build().parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.process = arguments is None
    try:
        options.run(options)
    except GigatrainError as failure:
        # What all ranks raise is said once; what they read alike before they met, once on each node, since another node may have other files.
        alike = "RANK" if failure.shared else "LOCAL_RANK" if isinstance(failure, (RecipeError, SiteError, PlanError)) else ""
        if os.environ.get(alike, "0") == "0":
            print(f"gigatrain: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except MemoryError:
        print("gigatrain: out of memory; lower train.microbatch or train.sequence", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `gigatrain recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as failure:  # a full disk, a folder without permission, a file system that went away
        if failure.strerror is None:
            raise
        print(f"gigatrain: {failure.strerror}{f': {failure.filename}' if failure.filename else ''}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
