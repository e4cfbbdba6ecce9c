"""The error tree, and the exit code that belongs to each branch.

    StreamMergeError            1   a fault of ours
    ├── UserError               2   the user's to change
    │   ├── RecipeError             the recipe, with every mistake in it
    │   │   └── TaskError           tasks and their data files, with every mistake in them
    │   ├── ShapeMismatch           inputs of different shapes
    │   └── OutputError             OUT is occupied, locked, or of another recipe
    ├── DoesNotFit              3   memory or disk, before or midway
    ├── InputError              4   an input is missing, corrupt or changed
    ├── VerificationFailed      5   a checksum differs
    └── Stopped                75   stopped by a signal, work saved

A message says what is wrong, where, found against expected, and what to do.
"""

from __future__ import annotations


class StreamMergeError(Exception):
    """The root of everything this program raises on purpose."""

    exit_code = 1


class UserError(StreamMergeError):
    """Something the user can change: a recipe, a flag, a directory, a permission."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be planned. `problems` holds one sentence for each mistake."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{where}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))


class TaskError(RecipeError):
    """Tasks, or the examples in their files, that cannot be scored."""


class ShapeMismatch(UserError):
    """Inputs that hold one tensor in different shapes."""


class OutputError(UserError):
    """The output directory cannot be used for this merge."""


class DoesNotFit(StreamMergeError):
    """The merge needs more memory or disk than there is."""

    exit_code = 3


class InputError(StreamMergeError):
    """An input file is missing, damaged, or changed while it was read."""

    exit_code = 4


class VerificationFailed(StreamMergeError):
    """Bytes on disk differ from the checksums of the manifest."""

    exit_code = 5


class Stopped(StreamMergeError):
    """A signal stopped the merge; what was finished is in the journal."""

    exit_code = 75


def error_of(exit_code: int) -> type[StreamMergeError]:
    """The plainest kind of error with an exit code: for errors that other processes have written down."""
    kinds = (UserError, DoesNotFit, InputError, VerificationFailed, Stopped)
    return next((kind for kind in kinds if kind.exit_code == exit_code), StreamMergeError)
