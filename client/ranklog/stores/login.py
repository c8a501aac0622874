"""The Hub's token of this moment: from a file, or from the Hub's own login (HF_TOKEN, `hf auth login`).

Looked up again for each request, so that a token can be replaced while a process runs. A token is never part of a text.
"""

import os
import re
import stat
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import OIDCError

from ranklog.errors import StoreError

_SIZE_MAX = 64 << 10
_TOKEN = re.compile(r"[\x21-\x7e]+")
"""What may stand in a header."""


def find_token(file: Path | None) -> str | None:
    """Return the token, None if nobody is logged in; raises a held StoreError where there should be one."""
    if file is not None:
        token: str | None = _read(file)
        where = f"the token file {file}"
    else:
        where = "the Hub's login"
        try:
            token = get_token()
        except (OSError, ValueError, RuntimeError, OIDCError) as exc:
            raise _held(f"{where} cannot be used: {type(exc).__name__}") from exc
    if token is not None and not _TOKEN.fullmatch(token):
        raise _held(f"{where} holds something that is no token: it must be one word") from None
    return token


def _read(file: Path) -> str:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise _held(f"the token file {file} is no file")
            data = os.read(fd, _SIZE_MAX)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _held(f"the token file cannot be read: {exc}") from exc
    # One that belongs to somebody else was put there for us, by a service manager or a cluster, with rights of its own.
    if info.st_uid == os.geteuid() and info.st_mode & 0o077:
        raise _held(f"the token file {file} can be read by others. Run: chmod 600 {file}")
    token = data.decode("ascii", "replace").strip()
    if not token:
        raise _held(f"the token file {file} is empty; write the token into it, no restart is needed")
    return token


def _held(text: str) -> StoreError:
    return StoreError(text, permanent=False, held=True)
