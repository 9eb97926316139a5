"""What the command line prints."""


def only_error(err: str) -> str:
    """The one line on stderr that is an error; stages that ended well may precede it."""
    (error,) = (line for line in err.splitlines() if line and not line.startswith("✓"))
    assert error.startswith("error:")
    return error
