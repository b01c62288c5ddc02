"""What one types: `python -m experiments` lists the commands. Their helpers are in folders by whom
they serve."""

from experiments.cli import c_library

c_library.prepare()  # here, since anywhere else jax is imported before
