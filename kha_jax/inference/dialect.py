"""How a model's text begins, ends and takes turns, as the files that came with its weights say.

An imported run keeps them in RUN/stock: tokenizer_config.json, generation_config.json and
chat_template.jinja. A run of our own has none, and its tokenizer says all.
"""

import datetime
import functools
import json
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from kha_jax.config import ConfigError
from kha_jax.data.tokenizers import JsonTokenizer, Tokenizer
from kha_jax.errors import DataError
from kha_jax.storage import open_regular

STOCK = "stock"  # folder in a run folder
TOKENIZER, GENERATION, TEMPLATE = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
LARGEST = 2**24  # bytes of each of them
HERE = "\uf8ff "  # what nobody writes: where a message ends that is gone on with

Message = Mapping[str, str]  # role and content


class Dialect(NamedTuple):
    """Of one model. begin: the id that begins a text, or None; ends: the ids that end one, that of
    the tokenizer first; template: the Jinja text that makes a prompt of messages, or None; words:
    what it may call special tokens; place: where these were read."""

    tokenizer: Tokenizer
    begin: int | None
    ends: tuple[int, ...]
    template: str | None
    words: dict[str, str]
    place: Path

    @property
    def prefix(self) -> int:
        """What the first token of a text is predicted from: `begin`, or the first of `ends`."""
        return self.ends[0] if self.begin is None else self.begin

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """The ids of a text as the model expects them, in which special tokens may be spelt.

        special: whether the tokenizer adds those that its file says, such as the one that begins a
        text; by default unless the text begins with that.
        """
        if not isinstance(self.tokenizer, JsonTokenizer):
            return self.tokenizer.encode(text.encode("utf-8", "surrogateescape")).tolist()
        library = _library(self.tokenizer.content)
        if special is None:
            spelt = library.id_to_token(self.prefix)
            special = not (spelt and text.startswith(spelt))
        return library.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(ids)

    @property
    def adds_begin(self) -> bool:
        """Whether the tokenizer begins every text with a token of its own."""
        return bool(self.encode("", special=True))

    def prompt(self, messages: Sequence[Message], answer: bool = True) -> str:
        """What the model is given of these messages, to answer them, or to go on with the last one,
        which has no end then.

        Raises:
            ConfigError: jinja2 is not installed.
            DataError: there is no template, or it cannot be used.
        """
        if self.template is None:
            raise DataError(f"{self.place}: there is no chat template")
        messages = list(messages)
        if not answer:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + HERE}
        from_messages = {"messages": messages, "add_generation_prompt": answer}
        text = _rendered(self.template, {**self.words, **from_messages}, self.place)
        if answer:
            return text
        own, mark, _ = text.rpartition(HERE)
        if mark:
            return own
        own, mark, _ = text.rpartition(HERE.rstrip())
        if not mark:
            raise DataError(f"{self.place}: the chat template leaves out the last message")
        return own.rstrip()  # as it trims messages


@functools.lru_cache(maxsize=4)
def _library(content: bytes) -> Any:
    """The tokenizer of a tokenizer.json, which reads special tokens in texts."""
    import tokenizers

    library = tokenizers.Tokenizer.from_buffer(content)
    library.no_truncation()
    library.no_padding()
    return library


def read(folder: Path, tokenizer: Tokenizer) -> Dialect:
    """The dialect of a run.

    Raises:
        DataError: names a file of RUN/stock that cannot be used.
    """
    stock = Path(folder) / STOCK
    said, generation = _json(stock / TOKENIZER), _json(stock / GENERATION)
    words = {name: _spelt(value) for name, value in said.items() if name.endswith("_token")}
    words = {name: word for name, word in words.items() if word is not None}
    begin, own = tokenizer.begin_of_document, tokenizer.end_of_document
    if isinstance(tokenizer, JsonTokenizer):
        begin = _id(tokenizer, words.get("bos_token"), begin)
        own = _id(tokenizer, words.get("eos_token"), own)
    more = generation.get("eos_token_id")
    more = more if isinstance(more, list) else [] if more is None else [more]
    if not all(isinstance(i, int) and 0 <= i for i in more):
        raise DataError(f"{stock / GENERATION}: eos_token_id is {more}; expected ids")
    ends = tuple(dict.fromkeys([own, *more]))
    return Dialect(tokenizer, begin, ends, _template(stock, said), words, stock)


def _id(tokenizer: JsonTokenizer, word: str | None, default: int | None) -> int | None:
    found = None if word is None else tokenizer.library.token_to_id(word)
    return default if found is None else found


def _spelt(value: Any) -> str | None:
    """A special token of tokenizer_config.json, written as it is or with how it is treated."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _text(path: Path) -> str | None:
    """Of a file, None where there is none."""
    try:
        with open_regular(path, "r", largest=LARGEST, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); put back that of the checkpoint") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged (no object); put back that of the checkpoint")
    return values


def _template(stock: Path, said: dict[str, Any]) -> str | None:
    """That of its own file, else the one in tokenizer_config.json, of several the default."""
    template = _text(stock / TEMPLATE) or said.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{stock / TOKENIZER}: chat_template is no text")
    return template


def _rendered(template: str, given: dict[str, Any], place: Path) -> str:
    """The template's text. It is a stranger's program: the sandbox lets it touch what it is given
    and nothing else, and change none of it."""
    try:
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ConfigError(
            "chat", "a chat template needs the extra: pip install -e '.[hf]'"
        ) from None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """{% generation %}, with which templates mark answers for training: what is in it stays."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda z, **how: json.dumps(z, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(given)
    except Exception as error:  # a template raises whatever its filters and calls do
        raise DataError(f"{place}: the chat template fails: {error}") from None
