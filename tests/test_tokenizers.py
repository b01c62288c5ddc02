"""Tokenizers: text that spells a special token is text, the end is never guessed, and ids are read
with the tokenizer that wrote them or not at all."""

import json

import numpy as np
import pytest

from kha_jax.config import ConfigError
from kha_jax.data import tokenizer_files, tokenizers
from kha_jax.data.tokenizer_files import PROBE
from kha_jax.data.tokenizers import ByteTokenizer, JsonTokenizer
from kha_jax.errors import DataError

TEXT = "Knocking heads, wörter und 数字 12345\n\tx<|endoftext|>y</s> 🙂"


def trained(special=("<|endoftext|>",), vocab_size=300, **changes) -> bytes:
    """The content of a small byte-level tokenizer.json; changes: of its fields."""
    library = pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return json.dumps({**json.loads(made.to_str()), **changes}).encode()


@pytest.mark.parametrize("kind", ["bytes", "json", "not marked special", "with begin"])
def test_text_comes_back_and_never_encodes_to_its_own_end(kind):
    content, begin = trained(("<|endoftext|>", "<bos>")), None
    if kind == "not marked special":  # as some published files have it
        values = json.loads(content)
        for token in values["added_tokens"]:
            token["special"] = False
        content = json.dumps(values).encode()
    if kind == "with begin":
        begin = "<bos>"
    made = ByteTokenizer() if kind == "bytes" else JsonTokenizer(content, begin=begin)
    text = f"{TEXT}<bos><|endoftext|>"
    ids = made.encode(text.encode())
    special = [made.end_of_document, *([made.begin_of_document] if begin else [])]
    assert not np.isin(special, ids).any() and ids.max() < made.vocabulary_size
    assert made.decode([*special, *ids, made.vocabulary_size + 7]) == text
    batch = made.encode_batch([text.encode(), b"", TEXT.encode()])
    for found, alone in zip(batch, (text, "", TEXT)):
        np.testing.assert_array_equal(found, made.encode(alone.encode()))


def test_settings_of_a_file_that_change_documents_are_left_out():
    """Truncation, padding, merges that are left out by chance, and what a post-processor adds."""
    values = json.loads(trained())
    values["model"]["dropout"] = 0.5
    direction = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["truncation"] = direction
    values["padding"] = {
        **{"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    }
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    values["post_processor"] = {
        **{"type": "TemplateProcessing", "single": single, "pair": single},
        "special_tokens": {"<|endoftext|>": special},
    }
    plain = JsonTokenizer(trained()).encode(TEXT.encode())
    found = JsonTokenizer(json.dumps(values).encode()).encode(TEXT.encode())
    np.testing.assert_array_equal(found, plain)


def test_ids_count_up_to_the_highest_added_token():
    """Files leave gaps: the number of tokens is no bound of their ids."""
    values = json.loads(trained())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 70_000, "content": "<late>"})
    try:
        made = JsonTokenizer(json.dumps(values).encode())
    except DataError:
        pytest.skip("this version of tokenizers closes gaps")
    assert made.vocabulary_size == max(made.library.get_vocab().values()) + 1


@pytest.mark.parametrize(
    "special, given, message",
    [
        (
            ("<pad>",),
            {},
            "has none of <|endoftext|>, .*say what ends a document, in the form .*end=",
        ),
        (("<eos>", "</s>"), {}, "has </s>, <eos>; say what ends a document"),
        (("<eos>",), {"end": "<end>"}, "end=<end> is no token of it; its special ones: <eos>"),
        (("<eos>",), {"end": 999_999}, "end=999999 is no token"),
        (("<eos>",), {"begin": "<eos>"}, "begin=<eos> is also what ends"),
    ],
)
def test_an_end_that_is_not_to_be_told_is_asked_for(special, given, message):
    content = trained(special)
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        JsonTokenizer(content, **given)
    named = JsonTokenizer(content, end=special[0])
    assert (
        named.end_of_document == JsonTokenizer(content, end=named.end_of_document).end_of_document
    )


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="bad.json is no tokenizer.json: .*Model missing"):
        tokenizers.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="sentencepiece models are not read; .*save_pretrained"):
        tokenizers.load("llama/tokenizer.model")
    with pytest.raises(ConfigError, match="No such file.*use bytes, or name a tokenizer.json"):
        tokenizers.load(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="bytes has an end of its own"):
        tokenizers.load("bytes", end="</s>")
    with pytest.raises(DataError, match="is not UTF-8"):
        JsonTokenizer(trained()).encode(b"\xff")
    (tmp_path / "tokenizer.json").write_bytes(trained())
    assert tokenizers.load(tmp_path).end_of_document == 0
    assert tokenizers.load("bytes").fingerprint == "bytes-v1"


def test_pieces_are_taken_where_no_setting_forbids_it():
    whole = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    level["use_regex"] = True
    assert JsonTokenizer(trained()).in_pieces and ByteTokenizer().in_pieces
    for changes in (
        {"pre_tokenizer": whole},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [level]}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
    ):
        assert not JsonTokenizer(trained(**changes)).in_pieces


def test_no_piece_ends_within_a_token():
    """Where words are not kept apart, tokens reach over the spaces between them."""
    library = pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    made = library.Tokenizer.from_buffer(trained())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert JsonTokenizer(made.to_str().encode()).in_pieces  # of which this one has none
    trainer = library.trainers.BpeTrainer(special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator(["it is one of the few in the world"] * 4, trainer)
    assert not JsonTokenizer(made.to_str().encode()).in_pieces


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_a_run_folder_keeps_the_tokenizer_of_its_ids(kind, tmp_path):
    assert tokenizer_files.read_kept(tmp_path) is None
    content = trained(("<eos>", "</s>", "<s>"))
    made = ByteTokenizer() if kind == "bytes" else JsonTokenizer(content, end="</s>", begin="<s>")
    tokenizer_files.keep(tmp_path, made)
    again = tokenizer_files.read_kept(tmp_path)
    assert tokenizer_files.about(again) == tokenizer_files.about(made)
    np.testing.assert_array_equal(again.encode(PROBE), made.encode(PROBE))
    path = tmp_path / tokenizer_files.IDS
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "probe_ids": said["probe_ids"][::-1]}))
    with pytest.raises(DataError, match="gives other ids for the probe text"):
        tokenizer_files.read_kept(tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="is damaged .holds other fields"):
        tokenizer_files.read_kept(tmp_path)
    if kind == "json":
        path.write_text(json.dumps(said))
        (tmp_path / "tokenizer.json").write_bytes(trained(vocab_size=290))
        with pytest.raises(DataError, match="tokenizer.json is not the one of its ids"):
            tokenizer_files.read_kept(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(DataError, match="lacks the tokenizer.json"):
            tokenizer_files.read_kept(tmp_path)
