"""Conversations: the cache that goes on, the files that say how a model takes turns, the
terminal."""

import functools
import io
import json
import os
import subprocess
import sys

import pytest

from experiments.cli import conversation
from kha_jax.config import ConfigError
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import DataError
from kha_jax.inference import dialect
from kha_jax.inference.decoding import PIECE, Decoder, Session
from kha_jax.inference.text import Continuation
from tests.test_decoding import ROOT, Bytes, named, random
from tests.test_evaluate import born

PROMPT = [5, 17, 3]
MORE = "everything", "gta", "gla", "moe"


@functools.cache
def session(name):
    """A decoder and a conversation with room for two pieces."""
    decoder = Decoder(named(name), random(named(name)))
    return decoder, Session(decoder, 2 * PIECE)


@pytest.mark.parametrize("name", ["gqa", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_a_conversation_says_what_it_would_say_afresh(name):
    """Going on, at a prompt that is longer than a piece, and back where another one leaves off."""
    (decoder, talk), prompt, said = session(name), PROMPT, []
    for more in ([7, 7], [i % 60 for i in range(PIECE)], None, None):
        parts = list(talk.stream(prompt, 6, chunk=4))
        assert [len(part) for part in parts] == [1, 4, 1]
        assert talk.ids[: len(prompt)] == prompt
        said.append((prompt, sum(parts, [])))
        prompt = [*prompt, *said[-1][1], *more] if more else [*PROMPT, 9][: 2 + len(said) // 2]
    prompts, answers = zip(*said)
    assert decoder.generate(prompts, 6) == list(answers)
    assert talk._more._cache_size() == 1
    with pytest.raises(ValueError, match=f"has {2 * PIECE} tokens, the cache room for {2 * PIECE}"):
        list(talk.stream([1] * 2 * PIECE, 1))


def test_an_answer_ends_at_each_of_several_tokens_and_with_the_room():
    _, talk = session("gqa")
    free = sum(talk.stream(PROMPT, 6, chunk=4), [])
    at, end = next((at, i) for at, i in enumerate(free) if i not in free[:at] and at)
    parts = sum(talk.stream(PROMPT, 6, chunk=4, end=(60, end)), [])
    assert parts[: at + 1] == free[: at + 1] and set(parts[at + 1 :]) <= {60}
    assert len(sum(talk.stream([1] * (2 * PIECE - 2), 6, chunk=4), [])) == 2
    text = Continuation(Bytes, [104], ends=(105, 106))
    text.add([97, 106, 97])
    assert text.ids == [97] and text.done


# ---------------------------------------------------------------- files of stock models
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ eos_token }}"
)
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]


def stock(folder, **files):
    """A run folder of a model with these files."""
    (folder / "stock").mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        ending = "jinja" if name == "chat_template" else "json"
        (folder / "stock" / f"{name}.{ending}").write_text(text)
    return dialect.read(folder, ByteTokenizer())


def test_a_template_makes_the_prompt(tmp_path):
    """Of its own file first, else of the tokenizer's, of several the default."""
    pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[hf]'")
    assert dialect.read(tmp_path, ByteTokenizer()).template is None
    own = {"eos_token": {"content": "<end>"}, "chat_template": TEMPLATE}
    expected = "<system>Be brief.</system>\n<user>Hi</user>\n<assistant><end>"
    assert stock(tmp_path, tokenizer_config=own).prompt(MESSAGES) == expected
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    found = stock(tmp_path, tokenizer_config={**own, "chat_template": several})
    assert found.prompt(MESSAGES) == expected
    assert stock(tmp_path, chat_template="{{ messages | length }}").prompt(MESSAGES) == "2"


def test_an_answer_that_is_gone_on_with_has_no_end(tmp_path):
    """As tasks ask that begin the answer themselves; the last message that looks like it is it."""
    pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[hf]'")
    begun = [*MESSAGES, {"role": "assistant", "content": "Hi "}]
    before = "<system>Be brief.</system>\n<user>Hi</user>\n<assistant>Hi"
    own = stock(tmp_path, chat_template=TEMPLATE)
    assert own.prompt(begun, answer=False) == before
    spaced = stock(tmp_path, chat_template=TEMPLATE.replace(" | trim", ""))
    assert spaced.prompt(begun, answer=False) == before.replace("Be brief.", " Be brief. ") + " "
    deaf = stock(tmp_path, chat_template="{{ messages[0].content }}")
    with pytest.raises(DataError, match="leaves out the last message"):
        deaf.prompt(begun, answer=False)


def test_marks_of_answers_for_training_change_nothing(tmp_path):
    pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[hf]'")
    marked = "{% generation %}{{ messages[1].content }}{% endgeneration %}!"
    assert stock(tmp_path, chat_template=marked).prompt(MESSAGES) == "Hi!"


FORBIDDEN = {
    "attributes of classes": "{{ messages.__class__.__mro__ }}",
    "changes of what it is given": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "endless ranges": "{% for i in range(10 ** 9) %}{% endfor %}",
    "no Jinja": "{% for",
    "what it refuses itself": "{{ raise_exception('no system message') }}",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_template_cannot_reach(what, tmp_path):
    pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[hf]'")
    with pytest.raises(DataError, match="stock: the chat template fails: "):
        stock(tmp_path, chat_template=FORBIDDEN[what]).prompt(MESSAGES)


def test_what_a_template_may_not_see_is_not_there(tmp_path):
    pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[hf]'")
    for hidden in ("raise_exception.__globals__", "'{0.__class__}'.format(messages)"):
        assert stock(tmp_path, chat_template=f"{{{{ {hidden} }}}}").prompt(MESSAGES) == ""


def test_a_template_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"needs the extra: pip install -e '.\[hf\]'"):
        stock(tmp_path, chat_template="a").prompt(MESSAGES)


def test_ends_are_those_of_the_tokenizer_and_of_generation(tmp_path):
    for said, ends in ((None, (256,)), (7, (256, 7)), ([9, 256, 7], (256, 9, 7))):
        assert stock(tmp_path, generation_config={"eos_token_id": said}).ends == ends
    with pytest.raises(DataError, match="generation_config.json: eos_token_id is"):
        stock(tmp_path, generation_config={"eos_token_id": ["</s>"]})
    with pytest.raises(DataError, match="tokenizer_config.json is damaged"):
        stock(tmp_path, tokenizer_config="[1]")


def test_special_tokens_are_read_in_prompts_and_not_in_texts(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    from kha_jax.data import tokenizers
    from tests.test_benchmarks import byte_tokenizer

    (tmp_path / "stock").mkdir()
    byte_tokenizer(tmp_path / "stock")
    own = tokenizers.load(tmp_path / "stock", end="<|endoftext|>")
    found = dialect.read(tmp_path, own)
    assert (found.begin, found.prefix, found.ends, found.adds_begin) == (1, 1, (0,), False)
    assert found.encode("a<bos>", special=False)[-1] == 1 and 1 not in own.encode(b"a<bos>")
    assert found.decode(found.encode("<bos>é b")) == "é b"


# ---------------------------------------------------------------- the terminal
def test_lines_are_answered_in_the_light_of_those_before(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  \ntwo"))
    seen = []

    def answer(messages):
        seen.append([m["content"] for m in messages])
        yield from ("a", "b")

    assert conversation.converse(answer, "sys") == 2
    assert seen == [["sys", "one"], ["sys", "one", "ab", "two"]]
    assert capsys.readouterr().out == "ab\nab\n"


@pytest.mark.slow
def test_the_command_chats(tmp_path):
    pytest.importorskip("jinja2", reason="needs the extra: pip install -e '.[hf]'")
    born(tmp_path / "run")

    def command(*flags, typed="Hi\nAnd?\n"):
        line = [sys.executable, "-m", "experiments.generate", f"--workdir={tmp_path}/run", *flags]
        environment = {**os.environ, "KHA_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
        how = {"capture_output": True, "text": True, "timeout": 600, "errors": "replace"}
        done = subprocess.run(line, cwd=ROOT, env=environment, input=typed, **how)
        return done.returncode, done.stdout, done.stderr

    code, _, err = command("--chat")
    assert code == 2 and "--chat: " in err and "has no chat template" in err
    stock(tmp_path / "run", chat_template=TEMPLATE.replace("{{ eos_token }}", ""))
    code, out, err = command("--chat", "--system=Be.", "--max_context=400", "--tokens=9")
    assert code == 0 and "2 answers" in err and out.count("\n") >= 2, err
    code, out, err = command("--chat", "--max_context=20")
    assert code == 2 and "--max_context=20: the conversation has grown to" in err, err
    for flags, message in (
        (["--chat", "--prompt=a"], "--prompt: does nothing with --chat"),
        (["--prompt=a", "--system=b"], "--system: does nothing without --chat"),
        (["--prompt=a", "--max_context=9"], "makes 201 with the longest --prompt, more than --max"),
    ):
        code, _, err = command(*flags)
        assert code == 2 and message in err and err.count("\n") == 1, err
