"""Messages of other libraries' errors, for messages of our own."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; without a message, its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
