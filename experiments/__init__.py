"""Commands: flags and loops only."""
