"""Commands of `ranklog` that need the daemon's packages: they start a daemon, or are one of its kind."""
