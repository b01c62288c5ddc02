"""Configs: what a field accepts, how kinds are switched on the command line, and what a bad value
is told."""

import copy
import dataclasses
import importlib
import pkgutil
import sys
from typing import Any, Literal

import pytest
from absl import flags
from ml_collections import config_dict, config_flags

import kha_jax
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import (
    HeadComposition,
    KnockingGate,
    KnockingLinear,
    KnockingMLP,
    NoMixer,
)
from kha_jax.attention.projections import GroupedQuery
from kha_jax.attention.projections.rotary import Llama3Scaling, YarnScaling
from kha_jax.config import (
    Config,
    ConfigError,
    choice,
    departures,
    dotted,
    from_dict,
    meanings,
    near,
    to_config_dict,
    to_dict,
)
from kha_jax.data import MultiQueryAssociativeRecall
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.model import AttentionFrom, LossConfig, ModelConfig, SameAttention
from kha_jax.modules import Numerics
from kha_jax.training.run_config import RunConfig


class Shape(Config):
    """The common type of a choice, as StreamMixer is of the mixers."""


class Circle(Shape):
    radius: float = 1.0
    label: str | None = None


class Polygon(Shape):
    corners: int = 4
    lengths: tuple[float, ...] = (1.0,)
    closed: bool = True


SHAPES = {"circle": Circle, "polygon": Polygon}


class Pen(Config):
    width: float = 1.0
    """Of the line,
    in millimetres."""
    colour: Literal["red", "green", "blue"] = "red"

    def validate(self):
        self.require(self.width > 0, "width", f"must be positive, found {self.width}")


class Drawing(Config):
    """One field of every form that a config may have; `name` is required."""

    name: str
    copies: int = 1
    zoom: float | None = None
    framed: bool = False
    pen: Pen = Pen()
    shape: Shape = choice(SHAPES, Circle())
    backdrop: Shape = choice(SHAPES, Polygon(), by="form")

    def validate(self):
        self.at_least(1, "copies", "zoom")


class Pencil(Pen):
    width: float = 0.5
    colour: Literal["black", "red"] = "black"
    """Of the lead."""
    hardness: int = 2


def drawing(**fields: Any) -> Drawing:
    return Drawing(**{"name": "house", **fields})


@pytest.mark.parametrize(
    "field, given, kept",
    [
        ("zoom", 2, 2.0),
        ("zoom", None, None),
        ("zoom", 1.5, 1.5),
        ("copies", 3, 3),
        ("framed", True, True),
    ],
)
def test_values_that_fit(field, given, kept):
    value = getattr(drawing(**{field: given}), field)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    "field, given, problem",
    [
        ("name", 3, "name: expected str, found 3 (int)"),
        ("copies", True, "copies: expected int, found True (bool)"),
        ("copies", 2.0, "copies: expected int, found 2.0 (float)"),
        ("copies", None, "copies: expected int, found None (NoneType)"),
        ("copies", 0, "copies: must be at least 1, found 0"),
        ("zoom", True, "zoom: expected float, found True (bool)"),
        ("zoom", "2", "zoom: expected float, found '2' (str)"),
        ("zoom", float("nan"), "zoom: must be finite in float32, found nan"),
        ("framed", 1, "framed: expected bool, found 1 (int)"),
        ("pen", Circle(), "pen: expected Pen, found Circle("),
        ("shape", Pen(), "shape: expected one of Circle, Polygon, found Pen("),
        ("shape", Shape(), "shape: expected one of Circle, Polygon, found Shape("),
        ("shape", None, "shape: expected one of Circle, Polygon, found None"),
    ],
)
def test_values_that_do_not_fit(field, given, problem):
    with pytest.raises(ConfigError) as error:
        drawing(**{field: given})
    assert str(error.value).startswith(problem)
    assert error.value.field == field


def test_tuples():
    assert Polygon(lengths=[1, 2.5]).lengths == (1.0, 2.5)
    assert all(type(length) is float for length in Polygon(lengths=(1, 2)).lengths)
    assert Polygon(lengths=[]).lengths == ()
    with pytest.raises(ConfigError, match=r"^lengths: expected a tuple, found 1\.0$"):
        Polygon(lengths=1.0)
    with pytest.raises(ConfigError, match=r"^lengths\[1\]: expected float, found 'x' \(str\)$"):
        Polygon(lengths=[1, "x"])


@pytest.mark.parametrize(
    "given, hint",
    [
        ("gren", "did you mean 'green'?"),
        ("Red", "did you mean 'red'?"),
        ("xyz", "use one of red, green, blue"),
    ],
)
def test_literal_names_the_nearest(given, hint):
    with pytest.raises(ConfigError) as error:
        Pen(colour=given)
    assert str(error.value) == f"colour: {given!r} is not known; {hint}"


def test_near_lists_everything_when_nothing_is_close():
    assert near("layer", ["layers", "width"]) == "did you mean 'layers'?"
    assert near("zzz", ["layers", "width"]) == "use one of layers, width"


def test_configs_are_frozen_keyword_only_and_hashable():
    pen = Pen(width=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pen.width = 3.0
    with pytest.raises(TypeError):
        Pen(2.0)
    # Modules hold their config and jit compares it: equal configs must hash alike, lists included.
    assert hash(drawing(shape=Polygon(lengths=[1, 2]))) == hash(
        drawing(shape=Polygon(lengths=(1.0, 2.0)))
    )
    assert hash(pen) != hash(Pen(width=3))


def test_replace_validates_again():
    assert Pen().replace(width=2) == Pen(width=2.0)
    with pytest.raises(ConfigError, match="^width: must be positive, found -1.0$"):
        Pen().replace(width=-1)


def test_errors_are_value_errors_and_gain_their_path():
    error = ConfigError("kv_heads", "is wrong").under("config.attention")
    assert isinstance(error, ValueError)
    assert (error.field, str(error)) == (
        "config.attention.kv_heads",
        "config.attention.kv_heads: is wrong",
    )
    assert str(ConfigError("", "does not add up")) == "does not add up"
    assert (
        str(ConfigError("", "does not add up").under("config.mesh"))
        == "config.mesh: does not add up"
    )


def test_required_field():
    with pytest.raises(ConfigError, match=r"^config\.name: is required and was not given$"):
        from_dict(Drawing, {"copies": 2})


def test_choices_stand_under_their_own_key():
    plain = to_dict(drawing(shape=Polygon(corners=5)))
    assert plain["shape"] == {"kind": "polygon", "corners": 5, "lengths": (1.0,), "closed": True}
    assert plain["backdrop"]["form"] == "polygon" and "kind" not in plain["backdrop"]


def test_kind_is_switched_on_the_command_line():
    values = to_config_dict(drawing())
    values.shape.kind = "polygon"
    values.shape.corners = 6
    assert from_dict(Drawing, values).shape == Polygon(corners=6)
    # Back again: a field left unset asks for the default of whichever kind is chosen.
    values = to_config_dict(drawing(shape=Polygon()))
    values.shape.kind = "circle"
    assert from_dict(Drawing, values).shape == Circle()


def test_values_of_the_chosen_kind_stay_where_the_config_file_set_them():
    values = to_config_dict(drawing(shape=Polygon(corners=3, closed=False)))
    values.copies = 2
    assert from_dict(Drawing, values) == drawing(shape=Polygon(corners=3, closed=False), copies=2)


def test_optional_field_is_typed_on_the_command_line():
    values = to_config_dict(drawing())
    values.zoom = 3.5
    assert from_dict(Drawing, values).zoom == 3.5
    with pytest.raises(TypeError):
        values.zoom = "near"
    values.copis = 2
    with pytest.raises(
        ConfigError, match=r"^config\.copis: is not a known field; did you mean 'copies'\?$"
    ):
        from_dict(Drawing, values)


@pytest.fixture
def parsed(monkeypatch):
    """What absl and ml_collections make of a command line; the latter reads sys.argv itself."""

    def parse(config: Config, *arguments: str) -> config_dict.ConfigDict:
        monkeypatch.setattr(
            sys, "argv", ["program", *(f"--config.{argument}" for argument in arguments)]
        )
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", to_config_dict(config), flag_values=values)
        values(sys.argv)
        return values.config

    return parse


def test_the_command_line_itself(parsed):
    arguments = [
        "copies=2",
        "zoom=3",
        "pen.colour=green",
        "shape.kind=polygon",
        "shape.corners=5",
        "shape.closed=false",
    ]
    expected = drawing(
        copies=2, zoom=3, pen=Pen(colour="green"), shape=Polygon(corners=5, closed=False)
    )
    assert from_dict(Drawing, parsed(drawing(), *arguments)) == expected
    assert from_dict(
        Drawing, parsed(drawing(), "shape.kind=polygon", "shape.lengths=(2.0,3.5)")
    ).shape.lengths == (2.0, 3.5)
    with pytest.raises(
        ConfigError,
        match=r"^config\.shape\.corners: does nothing with kind='circle'; it belongs to polygon$",
    ):
        from_dict(Drawing, parsed(drawing(), "shape.corners=5"))


def test_a_kind_switched_by_hand_drops_what_the_file_set_for_another():
    values = to_config_dict(drawing(shape=Polygon(corners=3), backdrop=Polygon(corners=5)))
    values.shape.kind = "circle"
    refused = r"^config\.shape\.corners: does nothing with kind='circle'"
    by_hand = {"config.shape.kind"}
    for typed in ((), {"config.shape.corners"}, {*by_hand, "config.shape.corners"}):
        with pytest.raises(ConfigError, match=refused):
            from_dict(Drawing, values, typed=typed)
    switched = from_dict(Drawing, values, typed=by_hand)
    assert switched == drawing(shape=Circle(), backdrop=Polygon(corners=5))


@pytest.mark.parametrize(
    "slot, given, problem",
    [
        (
            "shape",
            {"kind": "circel"},
            "config.shape.kind: 'circel' is not known; did you mean 'circle'?",
        ),
        (
            "shape",
            {"kind": "circle", "corners": 5},
            "config.shape.corners: does nothing with kind='circle'; it belongs to po",
        ),
        (
            "backdrop",
            {"form": "polygon", "radius": 2.0},
            "config.backdrop.radius: does nothing with form='polygon'; it bel",
        ),
        (
            "shape",
            {"kind": "circle", "radios": 2.0},
            "config.shape.radios: is not a known field; did you mean 'radius'?",
        ),
        (
            "shape",
            {"radius": 2.0},
            "config.shape: expected fields with 'kind' among them, found {'radius': 2.0}",
        ),
        ("shape", "circle", "config.shape: expected fields with 'kind' among them, found 'circle'"),
        ("backdrop", {"kind": "circle"}, "config.backdrop: expected fields with 'form' among them"),
        ("pen", {"color": "red"}, "config.pen.color: is not a known field; did you mean 'colour'?"),
        ("pen", {"width": 0}, "config.pen.width: must be positive, found 0.0"),
        ("pen", 3, "config.pen: expected fields of Pen, found 3"),
        (
            "shape",
            {"kind": "polygon", "lengths": ["a"]},
            "config.shape.lengths[0]: expected float, found 'a' (str)",
        ),
    ],
)
def test_nested_mistakes_name_their_full_path(slot, given, problem):
    with pytest.raises(ConfigError) as error:
        from_dict(Drawing, {"name": "house", slot: given})
    assert str(error.value).startswith(problem)


def test_a_field_of_another_kind_may_stay_unset():
    """None is how the command line's form says that nobody touched it."""
    assert (
        from_dict(Drawing, {"name": "house", "shape": {"kind": "circle", "corners": None}}).shape
        == Circle()
    )


def knocking(**slots: Any) -> ModelConfig:
    return ModelConfig(attention=AttentionConfig(**slots))


CONFIGS = {
    "default": ModelConfig(),
    "switched": ModelConfig(layers=2, embeddings="untied", stack="unroll", remat="full"),
    "nested": ModelConfig(
        attention=AttentionConfig(
            projection=GroupedQuery(
                query_heads=6, kv_heads=3, rope_theta=5e5, rope_scaling=YarnScaling(factor=8.0)
            ),
            kernel="reference",
        ),
        feed_forward=SwiGLU(width=11),
        loss=LossConfig(z_loss=1e-4),
        numerics=Numerics(dtype="float32", init_std=0.006),
    ),
    "knocking": knocking(query=KnockingLinear(), key=KnockingGate(), value=KnockingMLP()),
    "fields of kinds": knocking(
        query=KnockingLinear(parameterization="residual"), value=KnockingLinear(diag_init=0.5)
    ),
    "drawing": drawing(),
    "drawing, all set": drawing(
        copies=2,
        zoom=2.0,
        framed=True,
        pen=Pen(width=0.5, colour="blue"),
        shape=Circle(radius=2.0, label="sun"),
        backdrop=Polygon(lengths=(2.0, 3.0), closed=False),
    ),
    "drawing, empty tuple": drawing(shape=Polygon(lengths=())),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips(name):
    config = CONFIGS[name]
    assert from_dict(type(config), to_dict(config)) == config
    assert from_dict(type(config), to_config_dict(config)) == config
    # What a parsed command line holds has gone through a copy; config.json has gone through JSON,
    # where tuples are lists.
    assert from_dict(type(config), copy.deepcopy(to_config_dict(config))) == config
    assert from_dict(type(config), config_dict.ConfigDict(to_dict(config))) == config


def test_to_dict_shows_every_field():
    def leaves(config):
        fields = [getattr(config, field.name) for field in dataclasses.fields(config)]
        return sum(leaves(value) if isinstance(value, Config) else 1 for value in fields)

    def shown(values):
        return sum(field.rpartition(".")[2] != "kind" for field in dotted(values))

    for config in (CONFIGS["nested"], CONFIGS["knocking"], CONFIGS["fields of kinds"]):
        assert shown(to_dict(config)) == leaves(config)


def test_mixers_are_switched_on_the_command_line():
    values = to_config_dict(ModelConfig())
    assert values.attention.value.kind == "none"
    values.attention.value.kind = "mlp"
    values.attention.query.kind = "linear"
    values.attention.query.parameterization = "residual"
    values.attention.projection.rope_scaling.kind = "llama3"
    values.attention.projection.rope_scaling.factor = 16.0
    config = from_dict(ModelConfig, values)
    assert config.attention.value == KnockingMLP() and config.attention.key == NoMixer()
    assert config.attention.query == KnockingLinear(parameterization="residual")
    assert config.attention.projection.rope_scaling == Llama3Scaling(factor=16.0)


BAD_MODELS = [
    ("layers", 0, "must be at least 1, found 0"),
    ("layers", -4, "must be at least 1, found -4"),
    ("layers", 2.5, "expected int, found 2.5 (float)"),
    ("layer", 2, "is not a known field; did you mean 'layers'?"),
    ("width", True, "expected int, found True (bool)"),
    ("width", "256", "expected int, found '256' (str)"),
    ("vocabulary_size", 1, "must be at least 2, found 1"),
    ("embeddings", "tide", "'tide' is not known; did you mean 'tied'?"),
    ("stack", "loop", "'loop' is not known; use one of scan, unroll"),
    ("remat", "dot", "'dot' is not known; did you mean 'dots'?"),
    ("attention", None, "expected fields of AttentionConfig, found None"),
    ("attention.kernel", "splahs", "'splahs' is not known; did you mean 'splash'?"),
    ("attention.querry", "none", "is not a known field; did you mean 'query'?"),
    (
        "attention.projection.kind",
        "grouped_qery",
        "'grouped_qery' is not known; did you mean 'grouped_query'?",
    ),
    (
        "attention.projection.kv_heads",
        3,
        "must divide query_heads=8, found 3; use one of [1, 2, 4, 8]",
    ),
    (
        "attention.projection.kv_heads",
        16,
        "must divide query_heads=8, found 16; use one of [1, 2, 4, 8]",
    ),
    ("attention.projection.kv_heads", 0, "must be at least 1, found 0"),
    ("attention.projection.head_dim", 33, "must be even for rotary embedding, found 33"),
    ("attention.projection.head_dims", 32, "is not a known field; did you mean 'head_dim'?"),
    ("attention.projection.qk_norm", True, "True is not known; use one of rms, none"),
    ("attention.projection.rope_theta", 0, "must be at least 1, found 0"),
    ("attention.projection.rope_dim", 3, "must be even and at most head_dim=64, found 3"),
    ("attention.projection.rope_dim", 66, "must be even and at most head_dim=64, found 66"),
    (
        "attention.projection.rope_scaling.kind",
        "dynamic",
        "'dynamic' is not known; use one of none, linear, llama3, yarn",
    ),
    (
        "attention.projection.rope_scaling.factor",
        2.0,
        "does nothing with kind='none'; it belongs to linear and llama3 and yarn",
    ),
    ("attention.value.kind", "linaer", "'linaer' is not known; did you mean 'linear'?"),
    ("attention.value.diag_init", 1.0, "does nothing with kind='none'; it belongs to linear"),
    ("attention.value.diag", 1.0, "is not a known field; it has none"),
    ("attention.value", "linear", "expected fields with 'kind' among them, found 'linear'"),
    ("feed_forward.width", 0, "must be at least 1, found 0"),
    ("feed_forward.widht", 8, "is not a known field; did you mean 'width'?"),
    ("loss.z_loss", -1e-4, "must be at least 0, found -0.0001"),
    ("loss.z_loss", "0", "expected float, found '0' (str)"),
    ("loss.chunk_tokens", 0, "must be at least 1, found 0"),
    ("numerics.dtype", "float16", "'float16' is not known; did you mean 'bfloat16'?"),
    ("numerics.param_dtype", None, "None is not known; use one of float32, bfloat16"),
    ("numerics.init_std", 0, "must be positive, found 0.0"),
    ("numerics.norm_eps", float("nan"), "must be finite in float32, found nan"),
]


@pytest.mark.parametrize(
    "path, value, problem", BAD_MODELS, ids=[f"{path}={value}" for path, value, _ in BAD_MODELS]
)
def test_bad_models_are_told_what_is_wrong_and_where(path, value, problem):
    values = to_dict(ModelConfig())
    *parents, name = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    with pytest.raises(ConfigError) as error:
        from_dict(ModelConfig, values)
    assert str(error.value).startswith(f"config.{path}: {problem}")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e39, 10**40])
def test_no_float_of_a_run_is_infinite(value):
    """Not in float32 either, which is what it becomes."""
    mixers = AttentionConfig(query=KnockingGate(), key=KnockingLinear(), value=KnockingMLP())
    model = ModelConfig(attention=mixers, feed_forward=MoE(balancing_rate=0.1))
    runs = [RunConfig(model=model), RunConfig(data=MultiQueryAssociativeRecall())]
    values = ((run, dotted(to_dict(run)).items()) for run in runs)
    found = {field: run for run, of in values for field, z in of if isinstance(z, float)}
    assert len(found) > 15
    for field, run in found.items():
        path = field.split(".")
        values = node = copy.deepcopy(to_dict(run))
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value
        with pytest.raises(ConfigError, match=f"{path[-1]}: must be"):
            from_dict(RunConfig, values)


def test_layers_that_differ_are_said_on_the_command_line():
    """A member of a choice may hold configs of its own; they can be set, and stay unset."""
    slot = to_config_dict(ModelConfig(layers=4))
    assert from_dict(ModelConfig, slot).later == SameAttention()
    slot.later.kind, slot.later.layer = "from", 2
    slot.later.attention.key.kind = "compose"
    slot.later.attention.key.init = "normal"
    later = from_dict(ModelConfig, slot).later
    key = HeadComposition(init="normal")
    assert later == AttentionFrom(layer=2, attention=AttentionConfig(key=key))
    again = from_dict(ModelConfig, to_config_dict(ModelConfig(layers=4, later=later)))
    assert again.later == later == from_dict(ModelConfig, to_dict(again)).later
    slot.attention.projection.head_dim = 32
    slot.attention.value.kind = "mlp"
    likewise = from_dict(ModelConfig, slot).later.attention
    assert likewise.projection.head_dim == 32 and likewise.value == KnockingMLP()
    assert likewise.key == key
    slot.later.kind = "same"
    with pytest.raises(ConfigError, match="later.attention: does nothing with kind='same'"):
        from_dict(ModelConfig, slot)


def test_departures_are_what_a_new_default_leaves_alone():
    plain = RunConfig(model=ModelConfig(layers=4))
    assert departures(plain) == {"model": {"attention": {}, "loss": {}, "numerics": {}}} | {
        name: {} for name in ("optimizer", "evaluation", "checkpoint", "mesh", "profile")
    } | {"optimizer": {"mixer": {}}}
    linear = plain.model.attention.replace(key=KnockingLinear(diag_init=0.5))
    changed = plain.replace(model=plain.model.replace(attention=linear, layers=5))
    model = departures(changed)["model"]
    assert model["layers"] == 5
    assert model["attention"] == {"key": {"kind": "linear", "diag_init": 0.5}}


def kinds_of(cls: type) -> set[type]:
    return {cls}.union(*map(kinds_of, cls.__subclasses__()))


def test_every_field_has_one_line_of_meaning():
    for module in pkgutil.walk_packages(kha_jax.__path__, "kha_jax."):
        importlib.import_module(module.name)
    for cls in kinds_of(Config) - {Config}:
        if cls.__module__.startswith("kha_jax."):
            told = meanings(cls)
            lines = [told.get(field.name, "") for field in dataclasses.fields(cls)]
            assert all(line and line == line.strip() for line in lines), (cls, told)
            assert len({*lines}) == len(lines), (cls, told)
            assert all(len(line) <= 90 for line in lines), (cls, told)


def test_meanings_are_inherited_and_a_class_without_source_has_none():
    pen = {"width": "Of the line, in millimetres."}
    assert meanings(Pen) == pen and meanings(Pencil) == pen | {"colour": "Of the lead."}
    scope = {"Pen": Pen, "__name__": "typed"}
    exec("class Brush(Pen):\n    hairs: int = 9\n    'How many.'", scope)
    assert meanings(scope["Brush"]) == pen
