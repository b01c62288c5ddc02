"""The text of a continuation while its tokens come: whole characters, and where it stops."""

import itertools
from typing import Any, Collection, Iterable, Sequence


class Continuation:
    """A prompt and what follows it. `ids`: the tokens that came; `done`: nothing more counts.

    Args:
        tokenizer: has `decode` and `end_of_document`, the id that ends the continuation.
        ends: the ids that do, where it is not that one alone.
        prompt: ids, which may end inside a character.
        stops: strings of which the first to be whole in the continuation ends it and is left out.
            They may span tokens, but do not begin in the prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        ends: Collection[int] = (),
    ):
        self.ends = ends or (tokenizer.end_of_document,)
        self.tokenizer, self.prompt, self.stops = tokenizer, list(prompt), stops
        self.ids: list[int] = []
        self.done = False
        self.text = _whole(tokenizer.decode(self.prompt))
        self.begins, self.taken = len(self.text), 0

    def add(self, ids: Iterable[int]) -> None:
        """More tokens, as many as there are."""
        if self.done:
            return
        new = list(ids)
        own = list(itertools.takewhile(lambda i: i not in self.ends, new))
        ended = len(own) < len(new)
        self.ids += own
        self.text = _whole(self._decoded())
        found = [
            (at + len(s), at) for s in self.stops if (at := self.text.find(s, self.begins)) >= 0
        ]
        if found:
            # the first to be whole, so that it does not matter how many tokens come at once
            self.text, self.done = self.text[: min(found)[1]], True
        elif ended:
            self.finish()

    def finish(self) -> None:
        """No more tokens come: what looked like the beginning of something is text."""
        if not self.done:
            self.text, self.done = self._decoded(), True

    def take(self) -> str:
        """The text since the last call, of the prompt at first, that no later token changes."""
        settled = len(self.text) if self.done else len(self.text) - self._held()
        new = self.text[self.taken : settled]
        self.taken = max(self.taken, settled)
        return new

    def _decoded(self) -> str:
        return self.tokenizer.decode([*self.prompt, *self.ids])

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        own = self.text[self.begins :]
        starts = (stop[:size] for stop in self.stops for size in range(1, len(stop)))
        return max((len(start) for start in starts if own.endswith(start)), default=0)


def _whole(text: str) -> str:
    """Without what may be a part of a character: later bytes may bring the rest."""
    return text.rstrip("\ufffd")
