"""The one exception for mistakes that a person can mend."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message says where, what, and the mend.

    The command line prints it without a traceback and exits with code 2. Anything else that is raised is a
    bug and keeps its traceback.

    Args:
        headline: the place (file, shard, sample key or JSON path) and what is wrong, in one line.
        details: further lines: the arithmetic, then what to do.
    """

    def __init__(self, headline: str, *details: str) -> None:
        self.headline = headline
        self.details = details
        super().__init__("\n  ".join((headline, *details)))

    def __reduce__(self) -> tuple:
        # the default would rebuild it from the joined message alone when it crosses a process boundary
        return (type(self), (self.headline, *self.details))
