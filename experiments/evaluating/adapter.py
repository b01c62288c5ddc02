"""A run as lm-eval asks it (extra: eval): text in, numbers and text out.

lm-eval's own back end for Hugging Face models is what this agrees with: the same ids, the same
tokens in front of an empty context, the same beginnings left out of what is too long.
"""

import itertools
import logging
import time
from typing import Any, Iterator, NamedTuple, Sequence

from experiments.cli.codes import UsageError
from experiments.evaluating.models import Asked, scores
from kha_jax.inference.rows import Request, Row, Shape, Target, plan, windows
from kha_jax.inference.sampling import Sampling
from kha_jax.inference.scoring import SAID
from kha_jax.inference.text import Continuation

log = logging.getLogger("kha_jax")
NEW_TOKENS = 256  # of a task that does not say
PROGRAM = 16384  # tokens of padding that one more compiled shape of texts has to save
ROUND = 128  # tokens of the first round; each later one is as long as all before it
STEPS = 16  # tokens between two looks at what stops a text
SAMPLED = ("temperature", "top_k", "top_p")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Asking(NamedTuple):
    """How texts are generated: the same for all that are computed together."""

    stops: tuple[str, ...]
    tokens: int
    sampling: Sampling


def model(asked: Asked) -> Any:
    """The run as an lm_eval.api.model.LM."""
    from lm_eval.api.model import TemplateLM

    class Run(Answers, TemplateLM):
        """`Answers` under lm-eval's name for them."""

    return Run(asked)


class Answers:
    """What lm-eval asks of a model; see lm_eval.api.model.TemplateLM."""

    def __init__(self, asked: Asked):
        super().__init__()
        self.asked, self.dialect = asked, asked.dialect
        self.generated = self.cut = 0
        self.shapes = set[Any]()

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.dialect.ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self.dialect.prefix

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer and the template, where requests are kept."""
        return self.dialect.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text."""
        return self.dialect.template if chat_template else None

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        """A conversation as the prompt of its answer."""
        return self.dialect.prompt(chat_history, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """See `Dialect.encode`."""
        return self.dialect.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the likeliest) of each (context, continuation)."""
        asked = [request for request in requests if request.args[1]]
        found = iter(super().loglikelihood(asked, disable_tqdm=True))
        return [next(found) if request.args[1] else (0.0, False) for request in requests]

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        """The same of ((context, continuation), ids of one, ids of the other)."""
        asked = [Request(before or [self.prefix_token_id], ids) for _, before, ids in requests]
        return [tuple(score) for score in scores(self.asked, asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-probability of each text, in windows that share one token."""
        sums, parts, whose = [0.0] * len(requests), [], []
        for at, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            own = list(windows(ids, self.prefix_token_id, self.asked.max_length))
            parts, whose = parts + own, whose + [at] * len(own)
        for at, (log_p, _) in zip(whose, scores(self.asked, parts)):
            sums[at] += log_p
        return sums

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The text that follows each prompt, up to what stops it."""
        kinds: dict[Asking, list[int]] = {}
        for at, request in enumerate(requests):
            kinds.setdefault(self._asking(request.args[1]), []).append(at)
        out: dict[int, str] = {}
        for asking, numbers in kinds.items():
            out |= self.texts({at: requests[at].args[0] for at in numbers}, asking)
        return [out[at] for at in range(len(requests))]

    def texts(self, prompts: dict[int, str], asking: Asking) -> dict[int, str]:
        """What follows each prompt. Computed in rounds, after which texts that have stopped leave:
        a batch takes as long as its longest text."""
        ends, made, seeds, said = self.dialect.ends, 0, itertools.count(), time.monotonic()
        rows = {
            at: Continuation(self.dialect, self._prompt(text, asking), asking.stops, ends)
            for at, text in prompts.items()
        }
        while going := [row for row in rows.values() if not row.done]:
            now = asking._replace(tokens=min(max(ROUND, made), asking.tokens - made))
            made += now.tokens
            for shape, batch in self._batches(going, now):
                self.shapes.add((shape, now.tokens, now.sampling))
                self._go_on(batch, shape, now, next(seeds))
                if made == asking.tokens:
                    for row in batch:
                        row.finish()
                if time.monotonic() - said > SAID:
                    said, done = time.monotonic(), sum(row.done for row in rows.values())
                    log.info("%s: %d of %d texts", self.asked.workdir, done, len(rows))
        return {at: row.text[row.begins :] for at, row in rows.items()}

    def say_texts(self) -> None:
        """Logs how many were generated, and what was cut."""
        log.info(
            "%s: %d texts, %d of their prompts cut from the left, %d compiled shapes",
            *(self.asked.workdir, self.generated, self.cut, len(self.shapes)),
        )

    def _asking(self, said: dict[str, Any]) -> Asking:
        """What a task's generation_kwargs mean."""
        tokens = next((int(said[name]) for name in LENGTHS if said.get(name)), NEW_TOKENS)
        if tokens >= self.asked.max_length:
            raise UsageError(
                f"--max_context: a task asks for {tokens} new tokens, the model reads "
                f"{self.asked.max_length} with the prompt; set it to more"
            )
        until = said.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        given = {name: said[name] for name in SAMPLED if said.get(name) is not None}
        warm = given.get("temperature", 1.0) > 0
        sampled = said.get("do_sample", "temperature" in given) and warm
        sampling = Sampling(**{"temperature": 1.0, **given}) if sampled else Sampling()
        return Asking(tuple(filter(None, stops)), tokens, sampling)

    def _prompt(self, text: str, asking: Asking) -> list[int]:
        """Its ids, without a beginning that leaves no room for the answer."""
        ids = self.tok_encode(text) or [self.prefix_token_id]
        room = self.asked.max_length - asking.tokens
        self.generated, self.cut = self.generated + 1, self.cut + (len(ids) > room)
        return ids[-room:]

    def _batches(
        self, going: list[Continuation], asking: Asking
    ) -> Iterator[tuple[Shape, list[Continuation]]]:
        """Texts of similar lengths, the longest first, as many as take batch_tokens with what
        follows them; of few shapes, each of which takes long to compile."""
        columns = self.asked.decoder.columns
        sizes = [columns(len(one.prompt) + len(one.ids)) for one in going]
        new = [range(asking.tokens)]
        rows = [Row(range(size), new, [Target(at, 0, 0)]) for at, size in enumerate(sizes)]
        for shape, batch in plan(rows, self.asked.scorer.batch_tokens, program=PROGRAM):
            yield shape, [going[row.targets[0].request] for row in batch]

    def _go_on(self, batch: list[Continuation], shape: Shape, asking: Asking, seed: int) -> None:
        """More tokens for each of these texts."""
        begun = [[*row.prompt, *row.ids] for row in batch]
        filled = [*begun, *(shape.rows - len(batch)) * begun[:1]]
        how = {
            "sampling": asking.sampling,
            "end": self.dialect.ends,
            "chunk": STEPS,
            "seed": seed,
            "length": shape.prefix,
        }
        for part in self.asked.decoder.stream(filled, asking.tokens, **how):
            for row, ids in zip(batch, part.tolist()):
                row.add(ids)
            if all(row.done for row in batch):
                break
