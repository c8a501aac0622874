"""Looking at a state directory and mending it, beside the daemon: what `ranklog fsck` and `ranklog requeue` do.

    finding    what was found, and the step that would mend it                       pure
    header     a lost segment header, told from the entries behind it                pure
    segments   one WAL segment: every checksum, lsn and seq                          pure
    wal        the WAL directory: its segments and how they follow each other
    shards     outbox, cache, dead letters, quarantine, and the store
    frames     journal and spool files of dead and living writers
    survey     what is there: the facts of `fsck status`
    mend       carries out steps; the evidence first, each of them safe to do again
    requeue    what stands aside, and how it comes back into the line
    export     frames as JSON lines
    offline    the daemon's own lock, held while something is changed

Looking never changes anything and works while a daemon runs; files that go away meanwhile are skipped.
"""
