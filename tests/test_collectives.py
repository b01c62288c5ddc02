"""What the compiled step moves between devices, read from its HLO on eight virtual ones."""

import functools

import jax
import numpy as np
import pytest

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery
from kha_jax.comparing.properties import collectives
from kha_jax.feed_forward import MoE
from kha_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from kha_jax.training.step import make_trainer
from tests.test_training import MODEL, RUN

PLAIN = AttentionConfig(projection=GroupedQuery(query_heads=8, kv_heads=8, head_dim=8))
DENSE = MODEL.replace(stack="unroll", attention=PLAIN)
MIXTURE = DENSE.replace(feed_forward=MoE(experts=8, top_k=2, width=16, kernel="ragged"))


@functools.cache
def compiled(model, sizes, what):
    """(trainer, HLO text) of the train step or of the evaluation step, which is the forward
    pass."""
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes))))
    trainer = make_trainer(RUN.replace(model=model), mesh)
    step = {"train": trainer.train_step, "evaluation": trainer.evaluation_step}[what]
    return trainer, step.lower(trainer.abstract, trainer.abstract_batch).compile().as_text()


@pytest.mark.parametrize(
    ("model", "sizes", "expected"),
    [
        (DENSE, (8, 1, 1), {"all-gather": 9}),  # FSDP: seven matrices and the scales of two norms
        # Tensor parallel: the outputs of attention and feed-forward.
        (DENSE, (1, 1, 8), {"all-reduce": 2}),
        # Experts over `expert`: four matrices, the router, three of the experts and two norms;
        # tokens, choices and weights; one more step for a matrix that is gathered over two axes.
        # The results come back by one reduce-scatter.
        (MIXTURE, (2, 4, 1), {"all-gather": 14, "reduce-scatter": 1}),
    ],
    ids=["fsdp", "tensor", "expert"],
)
def test_collectives_of_one_more_layer(model, sizes, expected):
    more, base = (
        collectives(compiled(model.replace(layers=n), sizes, "evaluation")[1]) for n in (3, 2)
    )
    assert {kind: more[kind] - base[kind] for kind in more if more[kind] != base[kind]} == expected


MIXERS = {
    "query": KnockingLinear(apply="activations"),
    "key": KnockingGate(),
    "value": KnockingMLP(),
}


@pytest.mark.parametrize("what", ["evaluation", "train"])
def test_knocking_adds_no_collective_under_tensor_parallelism(what):
    """The matrices are whole on every device; their gradients join the all-reduce that is there for
    the norm scales."""
    model = DENSE.replace(layers=1)
    plain, knocking = (
        collectives(compiled(model.replace(attention=a), (1, 1, 8), what)[1])
        for a in (PLAIN, PLAIN.replace(**MIXERS))
    )
    assert plain == knocking and sum(plain.values()) > 0


def test_no_whole_parameter_or_moment_of_the_layers_is_ever_on_a_device():
    """FSDP: a layer's weights are gathered when it runs, the stack of all layers never is."""
    trainer, text = compiled(DENSE.replace(stack="scan", layers=3), (8, 1, 1), "train")
    whole = {
        leaf.shape for leaf in jax.tree.leaves(trainer.abstract.params["layers"]) if leaf.ndim > 2
    }
    assert len(whole) > 3
    for shape in whole:
        assert f"f32[{','.join(map(str, shape))}]" not in text
        shard = next(
            leaf
            for leaf in jax.tree.leaves(trainer.abstract.params["layers"])
            if leaf.shape == shape
        )
        assert f"f32[{','.join(map(str, shard.sharding.shard_shape(shape)))}]" in text
    assert (
        np.prod(trainer.abstract.params["embedding"].sharding.shard_shape((64, 32))) == 64 * 32 // 8
    )
