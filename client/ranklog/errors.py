"""The error tree. A caller asks one question of an error; its class answers it.

RanklogError                something this project detected, told in one sentence with its remedy
  UsageError                the caller's words are off; nothing was done (exit code 2)
  MissingExtra              an optional dependency is absent; the text holds the pip line (exit code 2)
  NoDaemon                  nobody answers on the socket (exit code 3)
  ProtocolError             bytes from the other side are not a message of this protocol
  FormatError               bytes on disk are not what their name says
  StoreError                an object store refused or failed; it says whether a retry can help, and when
"""


class RanklogError(Exception):
    """The base of every error that ranklog raises on purpose."""


class UsageError(RanklogError):
    """The caller's arguments or configuration are off: the text names field, value and limit."""


class MissingExtra(RanklogError):
    """A command needs an extra that is not installed; the text is the pip line that mends it."""

    def __init__(self, what: str, extra: str, module: str) -> None:
        super().__init__(
            f'{what} needs the package {module!r}, which is not installed. Run: pip install "ranklog[{extra}]"'
        )


class NoDaemon(RanklogError):
    """No daemon answers on the socket."""


class ProtocolError(RanklogError):
    """A message is not one of this protocol, or breaks one of its limits."""


class FormatError(RanklogError):
    """Bytes on disk are not what the file's name or header says they are."""


class StoreError(RanklogError):
    """An object store call failed.

    `permanent`: the store will never take this request; the same again cannot help. `held`: nothing is wrong with the
    request, but a person must do something first (log in, grant, create); asking again is right, and slowly. Neither:
    trouble that passes. `retry_after_s` is how long the store asked to be left alone, if it did.
    """

    def __init__(self, text: str, *, permanent: bool, held: bool = False, retry_after_s: float | None = None) -> None:
        assert not (permanent and held)
        super().__init__(text)
        self.permanent = permanent
        self.held = held
        self.retry_after_s = retry_after_s
