"""Results of DuckDB as Arrow, in such a way that Ctrl-C ends a long statement. Imports pyarrow.

DuckDB does not look at signals while it works, so a statement of the main thread could not be stopped. Statements run
in a worker thread instead; the caller waits, and passes Ctrl-C on as an interrupt.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

INTERRUPT_INTERVAL_S = 0.05
"""A person who pressed Ctrl-C does not notice this wait."""

_Result = TypeVar("_Result")


def fetch_table(con: duckdb.DuckDBPyConnection, statement: str) -> pa.Table:
    """Return a statement's rows, none for a statement without a result; raises duckdb.Error."""

    def work() -> pa.Table:
        relation: Any = con.sql(statement)
        return pa.table({}) if relation is None else relation.to_arrow_table()

    with ThreadPoolExecutor(1) as pool:
        return _wait(pool, con, work)


def fetch_batches(con: duckdb.DuckDBPyConnection, statement: str, batch_rows: int) -> Iterator[Any]:
    """Yield a statement's columns (an Arrow schema), then its rows in batches as they are computed.

    Yields nothing for a statement without a result. Raises duckdb.Error before the first row, and what Arrow makes of
    one, an OSError or ValueError, behind it.
    """

    def begin() -> Any:
        relation: Any = con.sql(statement)
        if relation is None:
            return None
        # DuckDB before 1.5 has the second name only.
        reader = getattr(relation, "to_arrow_reader", None) or relation.fetch_arrow_reader
        return reader(batch_rows)

    with ThreadPoolExecutor(1) as pool:
        reader = _wait(pool, con, begin)
        if reader is None:
            return
        yield reader.schema
        while (batch := _wait(pool, con, lambda: next(reader, None))) is not None:
            yield batch


def _wait(pool: ThreadPoolExecutor, con: duckdb.DuckDBPyConnection, work: Callable[[], _Result]) -> _Result:
    future = pool.submit(work)
    try:
        return future.result()
    except KeyboardInterrupt:
        while not future.done():
            con.interrupt()  # Again and again: one that comes between two statements stops neither.
            wait([future], INTERRUPT_INTERVAL_S)
        raise
