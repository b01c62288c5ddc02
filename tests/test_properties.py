"""Broken attentions are found by the name of what they break; tests/test_attention.py holds every
attention of the package to the same properties."""

import json
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kha_jax.attention import AttentionConfig, mixers, outputs
from kha_jax.attention.outputs import OutputMixer, OutputMixerModule
from kha_jax.comparing.properties import PROPERTIES, check
from kha_jax.config import to_dict
from kha_jax.model import AttentionFrom, ModelConfig, SameAttention
from kha_jax.modules import no_aux
from kha_jax.training.run_config import RunConfig
from tests.cases import PROJECTIONS, D
from tests.commands import run_all

GQA = PROJECTIONS["gqa"]


class Broken(OutputMixer):
    """o~ = change(o), with a parameter that the accounting does not know if `counts` is unset."""

    how: str = "nothing"
    claims: bool = False
    counts: int = 1

    @property
    def module(self):
        return BrokenOutput

    def identity_at_start(self):
        return self.claims

    def parameters(self, width, heads, value_dim):
        return self.counts


def several(o):
    if o.shape[1] == 1:
        raise ValueError("takes no single tokens")
    return o


CHANGES: dict[str, Any] = {
    "nothing": lambda o: o,
    "reads the future": lambda o: o + jnp.roll(o, -1, axis=1),
    "reads other documents": lambda o: o + o[:, :1],
    "mixes heads": lambda o: o + o[:, :, :1],
    "is not the identity": lambda o: 1.01 * o,
    "knows the length": lambda o: o * o.shape[1],
    "cannot be decoded": several,
}


class BrokenOutput(OutputMixerModule):
    """See Broken."""

    @nn.compact
    def __call__(self, o_BTNU, x_BTD, v_BTKU):
        self.weight("unused", nn.initializers.zeros, mixer_in=1)
        return CHANGES[self.config.how](o_BTNU), no_aux()


class BentLinear(mixers.LinearMixer):
    """tanh(z), which says that it is linear."""

    @property
    def module(self):
        return Bent

    def parameters(self, heads, head_dim):
        return 1


class Bent(mixers.StreamMixerModule):
    """See BentLinear."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return jnp.tanh(z) * self.matrix("kernel", nn.initializers.ones, 1)


class SaysItMixes(Broken):
    mixes_heads = True


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for kind in (Broken, SaysItMixes):
        monkeypatch.setitem(outputs.OUTPUT_MIXERS, kind.__name__, kind)
    monkeypatch.setitem(mixers.STREAM_MIXERS, "bent", BentLinear)


CASES = [
    ("causality", {"output": Broken(how="reads the future")}, "gradient of later tokens"),
    ("packed documents", {"output": Broken(how="reads other documents")}, "other documents is"),
    ("permuted heads", {"output": Broken(how="mixes heads")}, "says that it mixes no heads"),
    ("permuted heads", {"output": SaysItMixes()}, "a permutation changes"),
    (
        "identity at the start",
        {"output": Broken(how="is not the identity", claims=True)},
        "differs by 0.01, at most",
    ),
    ("cached decoding", {"output": Broken(how="knows the length")}, "decoded from a cache"),
    ("cached decoding", {"output": Broken(how="cannot be decoded")}, "ValueError: takes no single"),
    ("accounting", {"output": Broken(counts=3)}, "parameters, the accounting says"),
    ("folding", {"value": BentLinear(apply="activations")}, "output of folded weights"),
]


@pytest.mark.parametrize(("name", "fields", "said"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_what_is_broken_is_found_by_its_name(name, fields, said, monkeypatch):
    """The one property is measured; the others are those of test_attention."""
    for other in set(PROPERTIES) - {name, "accounting"}:
        monkeypatch.delitem(PROPERTIES, other)
    attention = AttentionConfig(projection=GQA, **fields)
    found = check(ModelConfig(layers=1, width=D, attention=attention))
    assert {prop for prop, of in found.items() if of.holds is False} == {name}
    assert re.search(said, found[name].text), found[name].text


def test_a_model_is_held_to_the_attention_of_its_later_layers(monkeypatch):
    for other in set(PROPERTIES) - {"accounting"}:
        monkeypatch.delitem(PROPERTIES, other)
    later = AttentionConfig(projection=GQA, output=Broken(counts=3))
    model = ModelConfig(
        layers=2,
        width=D,
        attention=AttentionConfig(projection=GQA),
        later=AttentionFrom(layer=1, attention=later),
    )
    assert check(model.replace(later=SameAttention()))["accounting"].holds
    assert check(model)["accounting"].holds is False


LEAKY = """
import flax.linen as nn
import jax.numpy as jnp
from kha_jax.attention import AttentionConfig
from kha_jax.attention.outputs import OUTPUT_MIXERS, OutputMixer, OutputMixerModule
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_config_dict
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.modules import no_aux
from kha_jax.training import RunConfig


class Leaky(OutputMixer):
    @property
    def module(self):
        return LeakyOutput


class LeakyOutput(OutputMixerModule):
    def __call__(self, o, x, v):
        return o + jnp.roll(o, -1, axis=1), no_aux()


OUTPUT_MIXERS["leaky"] = Leaky


def get_config(variant="none"):
    attention = AttentionConfig(
        projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=8),
        output=OUTPUT_MIXERS[variant](),
    )
    feed_forward = SwiGLU(width=64)
    model = ModelConfig(layers=1, width=16, attention=attention, feed_forward=feed_forward)
    return to_config_dict(RunConfig(seq_len=64, model=model))
"""


@pytest.fixture
def own(tmp_path):
    """A user's file, without and with what is broken."""
    (tmp_path / "mine.py").write_text(LEAKY)
    return f"--config={tmp_path / 'mine.py'}", f"--add={tmp_path / 'mine.py'}:leaky"


@pytest.mark.slow
def test_the_command_names_what_is_broken_and_leaves_with_1(own, tmp_path):
    (found,) = run_all([("check", [*own, "--only=mlp"])], tmp_path / "cache")
    assert found.code == 1 and "\nFAILED: mine-leaky\n" in found.out
    assert "mine-leaky       FAILED causality: the gradient of later" in found.out
    assert "mlp              ok identity at the start 0, permuted heads" in found.out


def test_the_command_compares_what_a_user_brings(own, tmp_path):
    path = tmp_path / "zoo.csv"
    cases = {
        "table": (*own, "--only=mlp", f"--csv={path}"),
        "match": ("--match=params,flops",),
        "only": ("--only=melp",),
        "add": ("--add=nowhere.py",),
        "lengths": ("--suite=scaling", "--lengths=256,x"),
        "another suite": ("--suite=variants", "--config.steps=3"),
        "no disk": ("--suite=saving", f"--save_to={tmp_path / 'none'}"),
        "seeds": ("--seeds=3",),
        "nothing": ("--only=",),
        "multiple": (*own[:1], "--only=mlp", "--multiple=100000", f"--csv={path}"),
        "frozen": ("--config.optimizer.trainable=mixers", "--only=mlp"),
        "narrow": ("--match=cache,params", "--only=latent"),
        "other steps": (*own[:1], "--only=mlp", "--train=3", f"--out={tmp_path / 'zoo'}"),
    }
    of_another_budget = tmp_path / "zoo" / "mlp-seed0"
    (of_another_budget / "checkpoints" / "00000009").mkdir(parents=True)
    (of_another_budget / "config.json").write_text(json.dumps(to_dict(RunConfig(steps=9))))
    measured = "lengths", "another suite", "no disk"
    lines = [
        ("benchmark" if name in measured else "zoo", list(arguments))
        for name, arguments in cases.items()
    ]
    found = dict(zip(cases, run_all(lines, tmp_path / "cache")))
    assert found["table"].code == 0, found["table"].err
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == [
        "variant",
        "baseline",
        "mlp",
        "mine-leaky",
    ]
    narrow = "latent: is brought to the same cache and params by a feed-forward of 21, the baseline"
    assert found["narrow"].code == 0 and narrow in found["narrow"].err, found["narrow"].err
    for name, said in (
        ("match", "--match=params,flops: parameters and FLOPs"),
        ("only", "--only=melp: is not known; did you mean 'mlp'?"),
        ("add", "--add: no file nowhere.py"),
        ("another suite", "--config: does nothing with --suite=variants; it belongs to scaling"),
        ("no disk", "/none: is no folder; name one that is there"),
        ("seeds", "--seeds: does nothing without --train"),
        ("nothing", "--only=: names nothing; is a variable of the shell not set?"),
        ("multiple", "--multiple=100000: config.model.feed_forward.width: cannot be small enough"),
        ("frozen", "error: config.optimizer.trainable: trains nothing with 'mixers'"),
        ("lengths", "--lengths=256,x: 'x' is no length of a row; write numbers from 2 on"),
        ("other steps", "/zoo: mlp-seed0 there began with config.steps=9, these flags make it 3"),
    ):
        assert found[name].code == 2 and said in found[name].err
        assert len(found[name].err.strip().splitlines()) == 1
