"""The exceptions that stand for a user's mistake."""


class UserError(Exception):
    """Shown as one line, without a traceback."""


class NonFiniteError(UserError):
    """The loss or its gradient is no finite number; the weights are those from before the step."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"{what} became {value}")
