"""Steps that are timed: here, in the peers, in turns; and what layers cost."""
