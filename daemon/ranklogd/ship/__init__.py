"""From sealed segments to parquet shards: the shipper's process. May import pyarrow; ingest never imports this room.

decode      a frame's body -> Record, with the typing rule                         pure
walk        a segment's bytes -> portions of records, whatever is wrong with them  pure
arrange     a cut's records -> one sorted long table for each run, as arrays       pure
shard       such a table -> the bytes and the key of one parquet object            pure
quarantine  evidence of what could not be read
convert     a segment file -> its shards, committed in the outbox
"""
