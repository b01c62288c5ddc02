"""A stored run, ready to be asked."""

import functools
import logging
from typing import Any, Sequence

import jax

from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from kha_jax.errors import DataError
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.folding import fold_if_linear
from kha_jax.inference.rows import Request
from kha_jax.inference.scoring import Score, Scorer
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.training.run_folder import read_config

log = logging.getLogger("kha_jax")


class Asked:
    """A run: its scorer, decoder and dialect.

    max_length: tokens that it reads at most, by default the length that it was trained on. devices:
    how many hold the model together.

    Raises:
        UsageError: there is no such run, or it has no tokenizer.
    """

    def __init__(
        self,
        workdir: str,
        step: int | None = None,
        *,
        batch_tokens: int,
        max_length: int | None = None,
        devices: int = 1,
    ):
        self.workdir, folder = workdir, stored.run_folder("workdir", workdir)
        config = read_config(folder)
        self.dialect = stored.dialect_of(workdir, folder, config)
        self.max_length = max_length or config.seq_len
        if self.max_length > config.seq_len:
            told = "%s: reads up to %d tokens at once; its config trains on %d"
            log.warning(told, workdir, self.max_length, config.seq_len)
        if devices > len(jax.devices()):
            raise UsageError(f"--devices={devices}: there are {len(jax.devices())}")
        mesh = make_mesh(MeshConfig(model=devices), jax.devices()[:devices])
        self.mesh = mesh = mesh if devices > 1 else None
        config, self.step, variables = stored.read_run(workdir, step, mesh)
        self.model, self.variables = fold_if_linear(config.model, variables)
        self.scorer = Scorer(
            self.model,
            self.variables,
            max_length=self.max_length,
            batch_tokens=batch_tokens,
            mesh=mesh,
        )

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Made when something is generated."""
        return Decoder(self.model, self.variables, mesh=self.mesh)

    def about(self) -> dict[str, Any]:
        """What results hang on beside the weights."""
        return {
            "workdir": self.workdir,
            "step": self.step,
            "tokenizer": self.dialect.tokenizer.fingerprint,
            "begins_texts": self.dialect.adds_begin,
            "prefix": self.dialect.prefix,
            "max_length": self.max_length,
        }

    def say_counts(self) -> None:
        """Logs what scoring has cost, and what was cut."""
        counts = self.scorer.counts
        log.info(
            "%s: %s requests, %s of them cut from the left to %d tokens; %s tokens, %.1f%% padding "
            "on top, %d compiled shapes",
            *(self.workdir, f"{counts.requests:,}", f"{counts.truncated:,}", self.max_length),
            *(f"{counts.tokens:,}", 100 * counts.padding, counts.programs),
        )


def scores(asked: Asked, requests: Sequence[Request]) -> list[Score]:
    """What its scorer says.

    Raises:
        DataError: names the run, and what is too long or no number.
    """
    try:
        return asked.scorer.score(requests)
    except ValueError as error:
        raise DataError(f"{asked.workdir}: {error}; set --max_context") from None
    except FloatingPointError as error:
        raise DataError(f"{asked.workdir}: {error}") from None
