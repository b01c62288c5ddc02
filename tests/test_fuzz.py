"""Whatever is said on the command line, and whatever stands in a token stream's files, is used or
refused in words. HYPOTHESIS_MAX_EXAMPLES=100000 searches for hours."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest

from experiments.cli.codes import UsageError
from experiments.cli.config_files import check_override
from kha_jax import accounting
from kha_jax.config import ConfigError, dotted, from_dict, to_dict
from kha_jax.data.python_source import open_shard, write_shard
from kha_jax.errors import DataError
from kha_jax.training.run_config import RunConfig
from tests.commands import defined
from tests.lines import cases, run, summary, wrong

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

SEARCH = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", 60)),
    deadline=None,
    derandomize="HYPOTHESIS_MAX_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
CONFIG = Path(__file__).parent.parent / "configs" / "kha_tiny.py"
get_config = runpy.run_path(str(CONFIG))["get_config"]


NAMES = sorted(dotted(get_config().to_dict()))
WORDS = (
    "grouped_tied",
    "latent",
    "collaborative",
    "mlp",
    "linear",
    "compose",
    "moe",
    "mqar",
    "from",
)
TEXTS = st.one_of(
    st.integers(-3, 300).map(str),
    st.sampled_from([2**31, 2**63 - 1, -(2**63), 10**30]).map(str),
    st.floats().map(str),
    st.sampled_from([*WORDS, "full", "none", "true", "", "1_0", "0x3", "٣", "1e400", "nan", "-0"]),
    st.text(max_size=5),
)
OVERRIDES = st.lists(st.tuples(st.sampled_from(NAMES), TEXTS), min_size=1, max_size=4)


def parsed(kind, text):
    """What the flag's parser makes of a value; ValueError where it refuses."""
    if kind is bool:
        return text == "true"
    return kind(text) if kind in (int, float, str) else text


@SEARCH
@given(OVERRIDES)
def test_overrides_make_a_config_or_a_line(overrides):
    config = get_config()
    try:
        for name, text in overrides:
            check_override(config, name, text)
            *parents, last = name.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            node[last] = parsed(node.get_type(last), text)
        made = from_dict(RunConfig, config)
        made.check_on({"data": 1, "expert": 1, "model": 1}, "cpu")
        accounting.check_memory(made.model, made.tokens_per_step // made.accumulation, 1e10)
    except (UsageError, ConfigError) as error:
        assert len(str(error).splitlines()) == 1 and "config" in f"config.{error}"
        return
    except TypeError as error:  # of ml_collections, which command_line shows as one line
        assert "is not compatible with" in str(error) or "must be" in str(error), error
        return
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(made)))) == made
    accounting.account(made.model, made.seq_len)


@SEARCH
@given(st.text(max_size=30), st.text(max_size=10))
def test_names_of_fields_are_known_or_refused(name, text):
    try:
        check_override(get_config(), name, text)
    except UsageError as error:
        assert str(error).startswith("config")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    texts = [b"one document", b"", b"and another that is longer"]
    return write_shard(tmp_path_factory.mktemp("fuzz"), "train", texts)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**400), st.floats(), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
META = ("dtype", "shards", "totals", "version", "end_of_document", "vocabulary_size", "tokenizer")
CHANGES = st.one_of(
    st.tuples(st.just("meta"), st.dictionaries(st.sampled_from(META), VALUES, max_size=3)),
    st.tuples(st.just("meta.json"), st.one_of(st.binary(max_size=40), VALUES)),
    st.tuples(st.sampled_from(["train-00000.bin", "train-00000.crc"]), st.binary(max_size=200)),
    st.tuples(
        st.sampled_from(["meta.json", "train-00000.bin", "train-00000.crc"]),
        st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4),
    ),
)


def changed(content, change):
    """A file after a change: other content, or other bytes at some places."""
    if isinstance(change, bytes):
        return change
    if isinstance(change, list) and all(isinstance(one, tuple) for one in change):
        out = bytearray(content)
        for at, byte in change:
            if at < len(out):
                out[at] = byte
        return bytes(out)
    return json.dumps(change).encode(errors="surrogatepass")


@SEARCH
@given(CHANGES, st.integers(1, 50))
def test_a_changed_stream_is_refused_or_reads_as_before(stream, change, seq_len):
    name, what = change
    path = stream / ("meta.json" if name == "meta" else name)
    before, whole = path.read_bytes(), open_shard(stream, "train", seq_len)
    expected = [whole[i] for i in range(len(whole))]
    if name == "meta":
        what = {**json.loads(before), **what}
    try:
        path.write_bytes(changed(before, what))
        source = open_shard(stream, "train", seq_len)
        for i, example in enumerate(expected):
            for key, value in source[i].items():
                np.testing.assert_array_equal(value, example[key])
        assert len(source) == len(expected) and np.isfinite(source.bytes_per_token)
    except DataError as error:
        assert str(stream) in str(error) and len(str(error).splitlines()) == 1
    finally:
        path.write_bytes(before)


def test_command_lines_are_made_of_every_flag_and_the_same_again():
    """Each command that there is has its turn, with flags that it defines."""
    known, made = defined(), list(cases(0, 2000))
    assert made == list(cases(0, 2000)) != list(cases(1, 2000))
    assert {case.command for case in made} == set(known)
    for name, takes in known.items():
        text = " ".join(a for case in made if case.command == name for a in case.arguments)
        assert [flag for flag in takes.flags if f"-{flag}" not in text] == []


@pytest.mark.slow
def test_any_command_line_ends_with_a_line_and_a_code():
    """Wrong types, empty, huge, negative, not numbers, twice, folders for files and files for
    folders, control characters: see tests.lines."""
    results = list(run(seed=0, count=1000))
    bad = [(wrong(found), case, found.err[-300:]) for case, found in results if wrong(found)]
    assert not bad, f"{bad}\n{summary(results)}"
