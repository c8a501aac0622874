"""ranklogd: the per-node daemon. Start with `server` (ingest) and `ship.shipper` (conversion and upload)."""
