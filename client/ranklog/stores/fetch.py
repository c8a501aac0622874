"""Many objects of a bucket at once: files are downloaded in groups, each with a deadline of its own."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ranklog.errors import StoreError
from ranklog.stores.base import Download
from ranklog.stores.hub import Deadline
from ranklog.stores.xet import Content, Wanted

GROUP_FILES_MAX = 256
GROUP_SIZE_MAX = 32 << 20
"""A slow line gets this far within the default deadline; and so often a progress bar moves."""


class Found(Protocol):
    """What the bucket says of an object."""

    @property
    def hash(self) -> str:
        """What its content store calls the bytes."""

    @property
    def size_bytes(self) -> int:
        """How many there are."""


def fetch_all(
    content: Content, limit_s: float, url: str, downloads: Sequence[Download], there: Mapping[str, Found]
) -> Iterator[str]:
    """Yield each key once its file is whole; the contract is that of `Store.fetch`."""
    try:
        for group in _groups([download for download in downloads if download.key in there], there):
            wanted = [Wanted(there[key].hash, there[key].size_bytes, target) for key, target in group]
            for file in wanted:
                if not file.size_bytes:
                    file.target.touch()
            if full := [file for file in wanted if file.size_bytes]:
                content.download_all(Deadline(limit_s), full)
            for key, target in group:
                _check_size(url, key, target, there[key].size_bytes)
                yield key
    except OSError as exc:
        raise StoreError(f"objects of {url} cannot be copied to this node: {exc}", permanent=False) from exc
    for download in downloads:
        if download.key not in there:
            raise StoreError(f"no object {download.key} in {url}", permanent=True)


def _check_size(url: str, key: str, target: Path, size_bytes: int) -> None:
    if (came_bytes := target.stat().st_size) != size_bytes:
        raise StoreError(f"{key} came with {came_bytes} of {size_bytes} bytes from {url}", permanent=False)


def _groups(downloads: Sequence[Download], there: Mapping[str, Found]) -> Iterator[list[Download]]:
    group: list[Download] = []
    group_bytes = 0
    for download in downloads:
        size_bytes = there[download.key].size_bytes
        if group and (len(group) == GROUP_FILES_MAX or group_bytes + size_bytes > GROUP_SIZE_MAX):
            yield group
            group, group_bytes = [], 0
        group.append(download)
        group_bytes += size_bytes
    if group:
        yield group
