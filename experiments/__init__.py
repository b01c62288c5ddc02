"""What one types: `python -m experiments` lists the commands. Their helpers are in folders by whom
they serve."""

import importlib.util
import sys

from experiments.cli import c_library

NEEDED = ("jax", "flax", "absl", "ml_collections", "orbax", "grain", "rich")

if sys.argv[0] == "-m":  # what Python says while it looks for a command
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            print(
                f"error: {sys.executable} has no {name}; run .venv/bin/python, which `make setup` "
                "makes",
                file=sys.stderr,
            )
            sys.exit(2)
c_library.prepare()  # here, since anywhere else jax is imported before
