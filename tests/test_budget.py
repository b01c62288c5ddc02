"""Models brought to one budget: by the accounting, which tests/test_accounting.py holds to XLA."""

import pytest

from kha_jax.accounting import account
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import HeadComposition, KnockingMLP
from kha_jax.attention.outputs import GatedOutput
from kha_jax.attention.projections import Collaborative, GroupedQuery, GroupedTied, Latent
from kha_jax.attention.scores import TalkingHeads
from kha_jax.comparing.budget import TOLERANCE, fit
from kha_jax.config import ConfigError
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.model import AttentionFrom, ModelConfig

SIZES = {"query_heads": 8, "head_dim": 32}
GQA = GroupedQuery(kv_heads=4, **SIZES)
BASE = ModelConfig(layers=3, width=128, attention=AttentionConfig(projection=GQA))
MIXTURE = MoE(experts=8, top_k=2, width=192, dense_layers=1, dense_width=64)
ATTENTIONS = {
    "mlp": AttentionConfig(projection=GQA, value=KnockingMLP()),
    "talking": AttentionConfig(projection=GQA, probabilities=TalkingHeads()),
    "gated": AttentionConfig(projection=GQA, output=GatedOutput(per="element")),
    "multi_head": AttentionConfig(projection=GQA.replace(kv_heads=8)),
    "tied": AttentionConfig(projection=GroupedTied(kv_heads=4, **SIZES)),
    "latent": AttentionConfig(projection=Latent(**SIZES)),
}
KEEP = ("kv_heads",)


def count(model):
    return account(model, 256, tokens=4096)


def with_width(model, width):
    return model.replace(feed_forward=model.feed_forward.replace(width=width))


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("feed_forward", [SwiGLU(width=384), MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_other_width_comes_nearer(name, feed_forward, measure):
    base = BASE.replace(feed_forward=feed_forward)
    model = base.replace(attention=ATTENTIONS[name])
    found = fit(model, count(base), [measure], count)

    def off(model):
        of = ("parameters", "training_flops")[measure == "flops"]
        return getattr(count(model), of) / getattr(count(base), of) - 1

    width = found.sizes["feed_forward.width"]
    assert found.model == with_width(model, width)
    assert found.errors == {measure: off(found.model)}
    around = [abs(off(with_width(model, w))) for w in (max(1, width - 1), width + 1)]
    assert abs(found.errors[measure]) <= min(around)
    assert abs(found.errors[measure]) <= TOLERANCE or feed_forward is MIXTURE


def test_more_to_spend_is_never_a_narrower_model():
    sizes = [
        fit(BASE, count(with_width(BASE, width)), ["flops"], count).sizes["feed_forward.width"]
        for width in range(1, 40)
    ]
    assert sizes == list(range(1, 40))


def test_widths_are_multiples_and_the_remaining_error_is_told():
    model = BASE.replace(attention=ATTENTIONS["mlp"])
    found = fit(model, count(BASE), ["params"], count, multiple=256)
    assert found.sizes == {"feed_forward.width": 768}
    assert found.errors["params"] == count(found.model).parameters / count(BASE).parameters - 1 > 0


@pytest.mark.parametrize(
    ("projection", "keep", "size"),
    [
        (GQA.replace(kv_heads=8), KEEP, {"head_dim": 16}),
        (GQA.replace(kv_heads=1), KEEP, {"head_dim": 128}),
        (GQA.replace(kv_heads=1), (), {"kv_heads": 4}),
        (Latent(**SIZES), (), {"kv_lora": 240}),
        (Latent(groups=2, **SIZES), (), {"kv_lora": 120}),
        (Collaborative(**SIZES), (), {"head_dim": 16}),
        (GQA, (), {}),
    ],
)
def test_caches_are_met_by_what_they_are_made_of(projection, keep, size):
    model = BASE.replace(attention=AttentionConfig(projection=projection))
    found = fit(model, count(BASE), ["cache"], count, keep)
    assert found.sizes == {f"attention.projection.{name}": value for name, value in size.items()}
    assert found.errors == {"cache": 0.0} and count(found.model).cache_floats == 3 * 256


def test_a_cache_that_cannot_be_met_is_the_nearest_and_says_so():
    """Tied states of 4 heads take (4 + 1/2) H, H a multiple of 4: 56 for 256 numbers."""
    model = BASE.replace(attention=ATTENTIONS["tied"])
    found = fit(model, count(BASE), ["cache"], count, KEEP)
    assert found.sizes == {"attention.projection.head_dim": 56}
    assert found.errors["cache"] == 252 / 256 - 1


def test_the_cache_is_met_first_and_then_the_parameters_in_all_layers():
    later = AttentionFrom(layer=2, attention=ATTENTIONS["latent"])
    model = BASE.replace(attention=ATTENTIONS["latent"], later=later)
    found = fit(model, count(BASE), ["params", "cache"], count)
    assert list(found.sizes) == ["attention.projection.kv_lora", "feed_forward.width"]
    assert found.errors["cache"] == 0 and abs(found.errors["params"]) < TOLERANCE
    assert found.model.later.attention == found.model.attention


@pytest.mark.parametrize(
    ("attention", "measure", "problem"),
    [
        (AttentionConfig(projection=GQA.replace(head_dim=512)), "params", "width: cannot be small"),
        (
            AttentionConfig(
                projection=GQA.replace(kv_heads=8), key=HeadComposition(), value=HeadComposition()
            ),
            "cache",
            "has no size that is free",
        ),
    ],
)
def test_what_cannot_be_met_is_one_line(attention, measure, problem):
    keep = ("kv_heads", "head_dim")
    with pytest.raises(ConfigError, match=problem) as raised:
        fit(BASE.replace(attention=attention), count(BASE), [measure], count, keep)
    assert "\n" not in str(raised.value)
