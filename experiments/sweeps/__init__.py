"""Sweeps: the runs of one, its members, and its report."""
