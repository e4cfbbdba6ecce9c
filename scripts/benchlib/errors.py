"""The one error that scripts/bench reports as a sentence instead of a traceback."""


class BenchError(Exception):
    """Something the user must change before this can be measured."""
