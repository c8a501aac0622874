"""The write-ahead log: `segment` is the format, `log` appends, syncs and rolls, `recover` reads it back at start.

`salvage` says what damaged bytes still tell, for recovery and conversion alike.
"""
