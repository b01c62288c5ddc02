"""Runs that are made of others, and of stock checkpoints: written, compared, imported, exported."""
