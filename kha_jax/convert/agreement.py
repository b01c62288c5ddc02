"""Whether two models compute the same: ours, and what transformers makes of a folder (extra:
interop).

Legend: B rows, T position, V vocabulary.
"""

import argparse
import importlib.util
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kha_jax.convert.families import family_of
from kha_jax.convert.folders import CONFIG
from kha_jax.errors import DataError
from kha_jax.model import ModelConfig
from kha_jax.storage import read_json

LIMIT = 2e-4  # of the spread, that logits may differ by at SHORT positions
MOST = 0.9  # of the positions of random ids, that LIMIT holds for
FAR = 10  # times as much at long ones: float32 angles differ there in the last digits
SHORT, LONG = 256, 2048
LOGIT_BYTES = 2**30  # that the logits of one side may take
NEEDS = "needs the extra: pip install -e '.[interop]'"


class Agreement(NamedTuple):
    """Of two models on the same tokens. largest: change of a logit. share: that over the spread of
    the logits, their root mean square around the mean over the vocabulary; most: the share that
    MOST positions stay within. kl: of the first's probabilities from the second's, mean, in nats.
    top1: share of positions with the same likeliest token. text: whether the tokens are a text.

    Random ids are no text that a trained model knows: at a few of them its float32 loses digits,
    and each way of computing it others (SmolLM2-135M: 9e-4 of the spread between two of
    transformers' own, 1.6e-5 at the middle position). So the limit holds for most of those.
    """

    positions: int
    largest: float
    logit: float
    share: float
    most: float
    kl: float
    top1: float
    text: bool

    @property
    def limit(self) -> float:
        return LIMIT if self.positions <= SHORT else LIMIT * FAR

    @property
    def within(self) -> bool:
        return (self.share if self.text else self.most) <= self.limit

    def __str__(self) -> str:
        most = f" and at {MOST:.0%} of them, of random ids, within {self.most:.2g}"
        return (
            f"at {self.positions} positions the largest change of a logit is {self.largest:.2g} of "
            f"{self.logit:.3g}, {self.share:.2g} of their spread{'' if self.text else most}; KL "
            f"{self.kl:.2g}, top-1 agreement {self.top1:.2%}"
        )


def agreement(first: np.ndarray, second: np.ndarray, text: bool = True) -> Agreement:
    """Of logits [B, T, V]."""
    changes_BT = np.abs(second - first).max(axis=-1)
    spread = float(np.sqrt(first.var(axis=-1).mean())) or 1.0
    p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(z), axis=-1)) for z in (first, second))
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1, dtype=np.float64)))
    same = float(np.mean(first.argmax(-1) == second.argmax(-1)))
    largest, logit = float(changes_BT.max()), float(np.abs(first).max())
    most = float(np.quantile(changes_BT, MOST)) / spread
    share, kl = largest / spread, max(kl, 0.0)
    return Agreement(first.shape[1], largest, logit, share, most, kl, same, text)


def sample(vocabulary: int, length: int, tokenizer: Any = None) -> np.ndarray:
    """Token ids [1, length]: of a text that every machine has, where there is a tokenizer, and
    random ones otherwise."""
    ids = np.random.default_rng(0).integers(0, vocabulary, length)
    if tokenizer is not None:
        text = tokenizer.encode(inspect.getsource(argparse).encode())
        ids = np.resize(np.asarray(text, np.int64), length)
    return ids[None].astype(np.int32)


def lengths(model: ModelConfig, longest: int) -> list[int]:
    """The two that are compared: a short one, and the longest that memory and patience allow."""
    room = LOGIT_BYTES // (4 * model.vocabulary_size)
    return sorted({min(SHORT, longest), max(1, min(longest, LONG, room))})


def our_logits(model: ModelConfig, variables: Any, ids_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T, V], computed in float32."""
    exact = model.replace(numerics=model.numerics.replace(dtype="float32"))
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(exact.build().apply)(variables, jnp.asarray(ids_BT)))


def class_for(path: Path) -> tuple[Any, dict[str, Any]]:
    """The class of transformers that computes a folder, that of its model_type or of another one
    that is the same model; and what it has to be told.

    Raises:
        DataError: there is none, only code in the folder, which is not run.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    values = read_json(path / CONFIG)
    kind, family = family_of(path / CONFIG, values)
    if kind in known:
        return transformers.AutoModelForCausalLM, {}
    found = getattr(transformers, family.architecture, None)
    if found is None:
        problem = f"transformers has no {family.architecture} to compare {kind} with"
        raise DataError(f"{path}: {problem}; go on without by --noverify")
    own = {name: value for name, value in values.items() if name != "model_type"}
    return found, {"config": found.config_class(**own)}


def can_compare() -> bool:
    """Whether transformers and torch are there."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def their_logits(path: Path, ids: list[np.ndarray], own_code: bool = False) -> list[np.ndarray]:
    """What transformers computes of a folder, in float32.

    own_code: the folder holds a file of ours, and nothing else that is run.

    Raises:
        DataError: transformers cannot read the folder, or misses tensors in it.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls, more = class_for(path)
    try:
        model, told = cls.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=own_code,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except Exception as error:  # whatever a library of this size raises
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: transformers does not read it: {problem[:300]}") from None
    if told["missing_keys"]:
        raise DataError(f"{path}: transformers misses {min(told['missing_keys'])}")
    model.eval()
    with torch.no_grad():
        return [model(torch.from_numpy(one.astype(np.int64))).logits.numpy() for one in ids]
