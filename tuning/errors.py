"""What went wrong, for whom: errors the user can mend, and the exit codes of every command."""

import functools
from contextlib import contextmanager


class UserError(Exception):
    """The user's input is at fault: `where` (file, row, field), what the `problem` is, and how to `fix` it.

    Shown as one message in that order, without a traceback. Every other exception keeps its traceback. Errors of a row
    also have the `field` they were found in, and a `kind`, by which a report groups them.
    """

    def __init__(self, *, problem: str, where: str = "", fix: str = "", field: str = "", kind: str = ""):
        super().__init__(problem)
        self.where, self.problem, self.fix = where, problem, fix
        self.field, self.kind = field, kind

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" {self.fix}" if self.fix else ""
        return f"{place}{self.problem}{advice}"

    def __reduce__(self):  # exceptions pickle their positional arguments, and there are none
        return functools.partial(UserError, **vars(self)), ()

    def with_field(self, field: str) -> "UserError":
        """The same error, found in `field` if it does not name a field yet."""
        return UserError(**{**vars(self), "field": self.field or field})


class RunEnded(Exception):
    """A run that ended early for a reason outside of the program: a signal, another process, the machine.

    Shown as `message` without a traceback, or not at all where it is empty; the command ends with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.message, self.exit_code = message, exit_code


@contextmanager
def error_field(name: str):
    """Name the field `name` in every `UserError` raised inside that names none."""
    try:
        yield
    except UserError as error:
        raise error.with_field(name) from error.__cause__
