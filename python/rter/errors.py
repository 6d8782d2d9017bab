"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Shown as one line, without a traceback."""
