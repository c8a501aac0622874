"""The content store of the loopback Hub: xorbs (runs of compressed chunks), shards (which file is which chunks).

A hash is 32 raw bytes, printed as four little-endian words of 64 bits. Nothing is computed here that the client
computes: bytes are stored under the hash they came with, and a test reads them back through the client.

    xorb    chunks of `version u8 | packed u24 | scheme u8 | unpacked u24 | bytes`; scheme 0 stored, 1 LZ4 frame,
            2 LZ4 of the bytes grouped by position modulo 4; then perhaps a footer, from "XETBLOB" on
    shard   48 bytes of header, then for each file 48 bytes (hash, flags, terms), and 48 for each term
            (xorb hash, flags, unpacked length, first chunk, end chunk); a hash of 0xFF… ends it
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow

EMPTY = "0" * 64


class Chunk(NamedTuple):
    """Where a chunk lies in its xorb."""

    start: int
    end: int
    scheme: int
    unpacked: int


class Term(NamedTuple):
    """A run of chunks of one xorb; a file is a list of them."""

    xorb: str
    unpacked: int
    first: int
    stop: int


def hash_text(raw: bytes) -> str:
    """Return a hash as the client prints it."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class Cas:
    """Xorbs and shards in a directory: what is there survives a restart of the server."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, list[Term]] = {EMPTY: []}
        self._tables: dict[str, list[Chunk]] = {}
        for path in sorted(directory.glob("*.shard")):
            self._learn(path.read_bytes())

    def has_xorb(self, name: str) -> bool:
        """Return whether a xorb is stored."""
        return (self._directory / f"{name}.xorb").exists()

    def put_xorb(self, name: str, data: bytes) -> None:
        """Store a xorb under the hash it came with."""
        path = self._directory / f"{name}.xorb"
        temporary = path.with_suffix(f".{id(data)}.tmp")
        temporary.write_bytes(data)
        temporary.rename(path)

    def xorb_range(self, name: str, start: int, end: int) -> bytes:
        """Return bytes start … end - 1 of a stored xorb."""
        with (self._directory / f"{name}.xorb").open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def put_shard(self, data: bytes) -> str:
        """Take note of the files a shard describes; return what is wrong with it, or nothing."""
        missing = {term.xorb for terms in _shard_files(data).values() for term in terms if not self.has_xorb(term.xorb)}
        if missing:
            return f"shard names xorbs that nobody uploaded: {sorted(missing)}"
        (self._directory / f"{len(list(self._directory.glob('*.shard'))):06}.shard").write_bytes(data)
        self._learn(data)
        return ""

    def _learn(self, data: bytes) -> None:
        self._files |= _shard_files(data)

    def size(self, file: str) -> int | None:
        """Return a file's size in bytes; None if no shard named it."""
        terms = self._files.get(file)
        return None if terms is None else sum(term.unpacked for term in terms)

    def read(self, file: str) -> bytes:
        """Return a file's bytes."""
        return b"".join(self._unpack(term) for term in self._files[file])

    def _unpack(self, term: Term) -> bytes:
        table = self._table(term.xorb)[term.first : term.stop]
        parts = []
        for chunk in table:
            data = self.xorb_range(term.xorb, chunk.start + 8, chunk.end)
            if chunk.scheme:
                data = pyarrow.decompress(data, decompressed_size=chunk.unpacked, codec="lz4", asbytes=True)
            parts.append(_ungroup(data) if chunk.scheme == 2 else data)
        return b"".join(parts)

    def _table(self, name: str) -> list[Chunk]:
        if name not in self._tables:
            data = (self._directory / f"{name}.xorb").read_bytes()
            table, start = [], 0
            while start + 8 <= len(data) and data[start] == 0:
                packed = int.from_bytes(data[start + 1 : start + 4], "little")
                unpacked = int.from_bytes(data[start + 5 : start + 8], "little")
                table.append(Chunk(start, start + 8 + packed, data[start + 4], unpacked))
                start += 8 + packed
            self._tables[name] = table
        return self._tables[name]

    def reconstruction(self, file: str, base_url: str, first: int, last: int | None) -> dict[str, Any] | None:
        """Return the plan by which a client rebuilds bytes first … last of a file; None where there are none."""
        size = self.size(file)
        if size is None or first >= max(size, 1):
            return None
        last = size - 1 if last is None else min(last, size - 1)
        terms: list[dict[str, Any]] = []
        runs: dict[str, list[tuple[int, int]]] = {}
        offset, skipped = 0, 0
        for term in self._files[file]:
            table = self._table(term.xorb)
            begin, lo, hi = offset, None, term.first
            for index in range(term.first, term.stop):
                chunk_end = offset + table[index].unpacked
                if chunk_end > first and offset <= last:
                    if lo is None:
                        lo = index
                        if not terms:
                            skipped = first - offset
                    hi = index + 1
                offset = chunk_end
            assert offset - begin == term.unpacked, "the shard and the xorb disagree"
            if lo is None:
                continue
            chunks = {"start": lo, "end": hi}
            unpacked = sum(chunk.unpacked for chunk in table[lo:hi])
            terms.append({"hash": term.xorb, "unpacked_length": unpacked, "range": chunks})
            runs.setdefault(term.xorb, []).append((lo, hi))
        xorbs = {name: self._fetches(name, found, base_url) for name, found in runs.items()}
        return {"offset_into_first_range": skipped, "terms": terms, "xorbs": xorbs}

    def _fetches(self, xorb: str, runs: list[tuple[int, int]], base_url: str) -> list[dict[str, Any]]:
        """Return what to fetch of a xorb: no chunk twice, for the client takes the first range that holds a term's start."""
        merged: list[list[int]] = []
        for lo, hi in sorted(runs):
            if merged and lo <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], hi)
            else:
                merged.append([lo, hi])
        table = self._table(xorb)
        return [
            {
                "url": f"{base_url}/xorb/{xorb}?chunks={lo}-{hi}",
                "ranges": [
                    {
                        "chunks": {"start": lo, "end": hi},
                        "bytes": {"start": table[lo].start, "end": table[hi - 1].end - 1},
                    }
                ],
            }
            for lo, hi in merged
        ]


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping of bytes by their position modulo 4."""
    grouped = numpy.frombuffer(data, dtype=numpy.uint8)
    plain = numpy.empty_like(grouped)
    start = 0
    for phase in range(4):
        count = len(plain[phase::4])
        plain[phase::4] = grouped[start : start + count]
        start += count
    return plain.tobytes()


def _shard_files(data: bytes) -> dict[str, list[Term]]:
    """Return the files a shard describes."""
    if not data.startswith(b"HFRepoMetaData\0"):
        raise ValueError("not a shard")
    files: dict[str, list[Term]] = {}
    offset = 48
    while data[offset : offset + 32] not in (b"\xff" * 32, b""):
        name = hash_text(data[offset : offset + 32])
        flags, count = struct.unpack_from("<II", data, offset + 32)
        offset += 48
        terms = []
        for _ in range(count):
            _, unpacked, first, stop = struct.unpack_from("<IIII", data, offset + 32)
            terms.append(Term(hash_text(data[offset : offset + 32]), unpacked, first, stop))
            offset += 48
        offset += 48 * count if flags & 1 << 31 else 0
        offset += 48 if flags & 1 << 30 else 0
        files[name] = terms
    return files
