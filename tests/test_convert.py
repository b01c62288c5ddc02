"""Stock checkpoints in and out, against transformers (extra: interop) where it is there."""

import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from kha_jax import convert
from kha_jax.attention.mixers import KnockingMLP
from kha_jax.config import ConfigError
from kha_jax.convert import agreement, placing
from kha_jax.convert.families import FAMILIES, read_config
from kha_jax.convert.folders import open_folder
from kha_jax.errors import DataError
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.training.step import abstract_variables
from tests import ling, stock_folders
from tests.stock_folders import FOLDERS, edited, folder

for needed in ("torch", "transformers"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[interop]'")
CLOSE = 1e-5  # of a logit


def variables_of(leaves) -> dict:
    """Variables from leaves."""
    return convert.nested((leaf.path, leaf.array()) for leaf in leaves)


def tensors(path: Path) -> dict:
    """Dtype, shape and bytes of every tensor."""
    found = open_folder(path).tensors.values()
    return {t.name: (t.dtype, t.shape, t.read().tobytes()) for t in found}


QUICK = ("llama3", "qwen2", "qwen3_moe")  # each way of reading and writing once


def rows(names=FOLDERS, quick=QUICK):
    """Names, of which those that are not quick are slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", rows())
def test_a_family_computes_the_same_and_comes_back_bit_equal(name, tmp_path):
    path, kind = folder(name), FOLDERS[name][0]
    stock = convert.open_stock(path)
    variables = variables_of(stock.leaves())
    assert set(by_path(variables)) == set(by_path(abstract_variables(stock.model)))

    ids, theirs = stock_folders.logits(path)
    ours = agreement.our_logits(stock.model, variables, ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)

    convert.keep(stock, tmp_path / "stock")
    record = convert.read_record(tmp_path / "stock")
    (back := tmp_path / "back").mkdir()
    assert convert.write(back, stock.model, variables, record) == kind
    assert tensors(back) == tensors(path)
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, back))
    assert {key: after[key] for key in before} == before
    rotary = after["rope_parameters"]
    assert after["rope_theta"] == rotary["rope_theta"] and after["torch_dtype"] == after["dtype"]
    others = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rotary.items() if key not in others}
    assert (after["rope_scaling"] or {"rope_type": "default"}) == scaling
    assert read_config("both", after) == read_config("one", before)


@pytest.mark.parametrize("name", rows(["qwen3_moe", "qwen3_moe_dense"]))
def test_leaves_grow_on_a_mesh_as_they_are(name):
    """On 8 devices with FSDP and split heads; no device holds what is not its own."""
    stock = convert.open_stock(folder(name))
    mesh = make_mesh(MeshConfig(data=4, model=2))
    like = by_path(abstract_variables(stock.model, mesh))
    for leaf in stock.leaves():
        placed = leaf.on(like[leaf.path])
        assert placed.sharding == like[leaf.path].sharding
        np.testing.assert_array_equal(np.asarray(placed), leaf.array())


def test_pieces_cover_what_they_are_of():
    """Also where a piece lies across the parts of devices."""
    mesh = make_mesh(MeshConfig(data=4, model=2))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    like = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=sharding)
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)

    def piece(row: int) -> placing.Piece:
        part = whole[row : row + 3]
        return placing.Piece((row, 0), part.shape, functools.partial(np.copyto, src=part))

    np.testing.assert_array_equal(placing.grown(like, map(piece, (0, 3, 6))), whole)


def test_an_array_that_grows_on_an_accelerator_is_the_same(monkeypatch):
    """Devices whose memory is not the host's are written to by donation."""
    stock = convert.open_stock(folder("qwen3_moe"))
    like = by_path(abstract_variables(stock.model, make_mesh(MeshConfig(data=4, model=2))))
    monkeypatch.setattr(placing, "HostShard", placing.DeviceShard)
    for leaf in itertools.islice(stock.leaves(), 3):
        np.testing.assert_array_equal(np.asarray(leaf.on(like[leaf.path])), leaf.array())


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("name", rows(["qwen3_moe", "mixtral"]))
def test_both_layouts_of_experts_are_read_and_written(name, fused, tmp_path):
    stock = convert.open_stock(folder(name))
    variables = variables_of(stock.leaves())
    convert.write(tmp_path, stock.model, variables, fused=fused)
    again = convert.open_stock(tmp_path)
    assert again.layout.fused == fused and again.model == stock.model
    for leaf in again.leaves():
        np.testing.assert_array_equal(leaf.array(), by_path(variables)[leaf.path])


def test_mixed_dtypes_and_shards_come_back(tmp_path):
    """bfloat16 beside float32, in files of their own, is written as it was; a value that bfloat16
    rounds is not exact, and --dtype says so."""
    stock = convert.open_stock(folder("qwen3"))
    variables = variables_of(stock.leaves())
    (half := tmp_path / "half").mkdir()
    convert.write(half, stock.model, variables, dtype="bfloat16", shard_bytes=20_000)
    assert len(list(half.glob("model-*.safetensors"))) > 3
    mixed = convert.open_stock(half)
    assert {t.dtype for t in mixed.folder.tensors.values()} == {"BF16"}
    rounded = variables_of(mixed.leaves())
    convert.keep(mixed, tmp_path / "stock")
    record = convert.read_record(tmp_path / "stock")
    some = [t._replace(dtype="F32") if "norm" in t.name else t for t in record.tensors]
    (back := tmp_path / "back").mkdir()
    convert.write(back, mixed.model, rounded, record._replace(tensors=some))
    first, second = tensors(half), tensors(back)
    assert first.keys() == second.keys() and {d for d, *_ in second.values()} == {"F32", "BF16"}
    assert all(second[n] == first[n] for n in first if "norm" not in n)
    files = {p.name for p in half.glob("model*")}
    assert files == {p.name for p in back.glob("model*")}
    from safetensors import safe_open  # another reader finds the same

    for path in back.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():
                ours = open_folder(back).tensors[name].read().astype(np.float32)
                np.testing.assert_array_equal(opened.get_tensor(name).float().numpy(), ours)


# ------------------------------------------------------------------ faults that are planted


def swapped(first: str, second: str):
    """Two tensors of every layer under each other's name."""

    def plant(path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        held = load_file(path / "model.safetensors")
        for name in [n for n in held if first in n]:
            other = name.replace(first, second)
            held[name], held[other] = held[other].copy(), held[name].copy()
        save_file(held, path / "model.safetensors")

    return plant


def key(**changes):
    """Other values in config.json."""

    def plant(path: Path) -> None:
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(values))

    return plant


def rows_swapped(path: Path) -> None:
    """The first key head for the first query head, in the tensor that holds both."""
    from safetensors.numpy import load_file, save_file

    held, H = load_file(path / "model.safetensors"), stock_folders.H
    for name in [n for n in held if n.endswith("query_key_value.weight")]:
        blocks = held[name].reshape(-1, H, stock_folders.D)
        blocks[[0, stock_folders.N]] = blocks[[stock_folders.N, 0]]
    save_file(held, path / "model.safetensors")


def untied(path: Path) -> None:
    """The table of the first tokens for the last ones, as a head of its own."""
    from safetensors.numpy import load_file, save_file

    held = load_file(path / "model.safetensors")
    held["lm_head.weight"] = np.roll(held["model.embed_tokens.weight"], 1, axis=0)
    save_file(held, path / "model.safetensors")
    key(tie_word_embeddings=False)(path)


PLANTED = {
    "q and k swapped": ("llama", swapped("q_proj", "k_proj")),
    "gate and up swapped": ("qwen3", swapped("gate_proj", "up_proj")),
    "one expert shifted": ("qwen3_moe", swapped("experts.1.", "experts.2.")),
    "epsilon": ("llama", key(rms_norm_eps=1e-6)),
    "base": ("qwen3", key(rope_parameters={"rope_type": "default", "rope_theta": 2e4})),
    "scaling dropped": ("llama3", key(rope_parameters={"rope_theta": 5e5})),
    "rotary not permuted": ("deepseek_v3", key(rope_interleave=False)),
    "weights of experts not divided": ("qwen3_moe", key(norm_topk_prob=False)),
    "tied table untied": ("qwen3", untied),
    "q and k swapped where they are one": ("bailing_moe", rows_swapped),
}


@pytest.mark.parametrize("name", rows(PLANTED, ["q and k swapped", "epsilon"]))
def test_planted_faults_are_beyond_the_limit(name, tmp_path):
    """Each makes another function, and the comparison sees it; an epsilon is the smallest."""
    of, plant = PLANTED[name]
    path = shutil.copytree(folder(of), tmp_path / "planted")
    plant(path)
    stock = convert.open_stock(path)
    ids, theirs = stock_folders.logits(folder(of))
    ours = agreement.our_logits(stock.model, variables_of(stock.leaves()), ids)
    for text in (True, False):
        found = agreement.agreement(theirs, ours, text)
        assert not found.within, found
    assert found.most > 2 * found.limit, found


@pytest.mark.parametrize("positions", [256, 2048])
def test_a_few_positions_of_random_ids_may_differ_by_more_and_not_all_of_them(positions):
    """At some a trained model loses digits; what is another function moves most of them."""
    theirs = np.random.default_rng(0).normal(size=(1, positions, 60))
    limit = agreement.LIMIT * (1 if positions == 256 else agreement.FAR)
    few, all_of_them = theirs.copy(), theirs.copy()
    few[0, :: positions // 16] += 50 * limit
    all_of_them += 2 * limit * np.random.default_rng(1).choice([-1, 1], theirs.shape)
    within = {
        text: [agreement.agreement(theirs, ours, text).within for ours in (few, all_of_them)]
        for text in (True, False)
    }
    assert within == {True: [False, False], False: [True, False]}
    assert agreement.agreement(theirs, theirs + limit / 2).within


# ------------------------------------------------------------------ what is refused

CONFIGS = {
    "an unknown type": ("qwen3", {"model_type": "qwen9"}, "'qwen9', which is not known"),
    "a family we have not": ("qwen3", {"model_type": "gemma2"}, "soft caps"),
    "a key nobody knows": ("qwen3", {"logit_softcap": 30.0}, "logit_softcap is 30.0"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "only 'silu'"),
    "a window": ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
    "layers of other kinds": ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "dynamic scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "of the scalings linear, llama3, yarn",
    ),
    "two bases": ("llama", {"rope_theta": 5e5}, "rope_parameters says otherwise"),
    "two scalings": ("llama3", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "otherwise"),
    "dense layers in the middle": ("qwen3_moe", {"mlp_only_layers": [1]}, "first layers"),
    "no number of layers": ("qwen3", {"num_hidden_layers": None}, "num_hidden_layers is not there"),
    "half a layer": ("qwen3", {"num_hidden_layers": 2.5}, "expected a whole number"),
    "too many layers": ("smollm2", {"num_hidden_layers": 4}, "model.layers.3.input_layernorm"),
    "too few": ("smollm2", {"num_hidden_layers": 2}, "is not expected"),
    "tied where it is not": ("llama", {"tie_word_embeddings": True}, "lm_head.weight differs"),
    "no tied table": ("qwen3", {"tie_word_embeddings": False}, "lm_head.weight is missing"),
    "Ling 1": ("bailing_moe", {"score_function": None}, "score_function is not there"),
    "another share of a head": ("bailing_moe", {"rotary_dim": 4}, "rotary_dim is 4; expected 8"),
    "a normed head": ("bailing_moe", {"norm_head": True}, "norm_head is True"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_computed_is_refused_by_its_key(name, tmp_path):
    of, changes, said = CONFIGS[name]
    with pytest.raises(DataError) as caught:
        convert.read(edited(folder(of), tmp_path / "other", **changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_mixer_that_our_file_has_no_place_for_is_refused(tmp_path):
    """modeling_kha.py replaces q_proj, k_proj and v_proj, which Ling has as one."""
    stock = convert.open_stock(folder("bailing_moe"))
    model = stock.model.with_attention(lambda attention: attention.replace(value=KnockingMLP()))
    convert.keep(stock, tmp_path / "stock")
    record = convert.read_record(tmp_path / "stock")
    with pytest.raises(ConfigError, match=r"^attention.value: is not linear, and bailing_moe has"):
        convert.kind_for(model, record)


JUNK = (None, "x", "", -1, 2.5, 1e400, [], [[]], {}, {"a": 1}, {"rope_type": []}, True, 10**30)
MORE = set(
    "rope_scaling rope_parameters rope_theta layer_types mlp_only_layers eos_token_id".split()
)
MORE |= set("sliding_window num_nextn_predict_layers partial_rotary_factor kha_mixers".split())


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe_dense", "bailing_moe"])
def test_no_value_of_a_key_ends_in_anything_but_one_line(name):
    """What cannot be read is refused with the key; a line that it can be, is read."""
    import transformers

    kind, fields = FOLDERS[name]
    made = {**stock_folders.BASE, **fields}
    values = ling.CONFIG
    if kind != "bailing_moe":
        values = transformers.AutoConfig.for_model(kind, **made).to_dict()
    for key in sorted(MORE | set(values)):
        for junk in JUNK:
            try:
                read_config("config.json", {**values, key: junk})
            except DataError as error:
                assert "\n" not in str(error) and str(error).startswith("config.json: ")


def header(path: Path, change) -> None:
    """Rewrites the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + size])
    text = json.dumps(change(values) or values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])


def overlapping(path: Path) -> None:
    def change(values):
        values["model.norm.weight"]["data_offsets"] = [0, 4 * stock_folders.D]

    header(path / "model.safetensors", change)


def as_float16(path: Path) -> None:
    def change(values):
        values["model.norm.weight"]["dtype"] = "F16"

    header(path / "model.safetensors", change)


def indexed(path: Path, file: str = "model-1.safetensors", **more) -> None:
    """One file, and an index that names it."""
    names = open_folder(path).tensors
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    listed = {"weight_map": {**dict.fromkeys(names, file), **more}}
    (path / "model.safetensors.index.json").write_text(json.dumps(listed))


def twice(path: Path) -> None:
    names = list(open_folder(path).tensors)
    shutil.copy(path / "model.safetensors", path / "other.safetensors")
    indexed(path, **{names[0]: "other.safetensors"})


DAMAGES = {
    "no config": (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: is not readable"),
    "a list": (lambda p: (p / "config.json").write_text("[]"), "holds a list"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a pickle": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        "is a pickle, which runs code",
    ),
    "cut": (cut, "it was cut"),
    "a long header": (
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
        "its header would have",
    ),
    "overlapping": (overlapping, "does not begin where the one before it ends"),
    "float16": (as_float16, "is F16; F32 and BF16 are read"),
    "another folder": (lambda p: indexed(p, "../x.safetensors"), "no safetensors file beside it"),
    "a file that is gone": (lambda p: indexed(p, "model-2.safetensors"), "is missing"),
    "listed twice": (twice, "not where it says"),
    "not listed": (
        lambda p: (indexed(p), header(p / "model-1.safetensors", with_one_more)),
        "not where it says",
    ),
    "both": (lambda p: (indexed(p), shutil.copy(*both(p))), "remove the one that is not meant"),
}


def with_one_more(values):
    values["extra"] = values.pop("model.norm.weight")


def both(path: Path):
    return path / "model-1.safetensors", path / "model.safetensors"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(name, tmp_path):
    damage, said = DAMAGES[name]
    path = shutil.copytree(folder("smollm2"), tmp_path / "damaged")
    damage(path)
    with pytest.raises(DataError) as caught:
        convert.open_stock(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_part_of_the_model_is_named_and_skipped(tmp_path):
    """Old tables of frequencies; a copy of a tied table is one of it, and is written again."""
    from safetensors.numpy import load_file, save_file

    path = shutil.copytree(folder("smollm2"), tmp_path / "old")
    held = load_file(path / "model.safetensors")
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = {frequencies: np.ones(4, np.float32)}
    more["lm_head.weight"] = held["model.embed_tokens.weight"]
    save_file(held | more, path / "model.safetensors")
    (path / "notes.txt").write_text("of somebody")
    stock = convert.open_stock(path)
    assert stock.skipped == [frequencies] and stock.folder.unknown() == ["notes.txt"]
    convert.keep(stock, tmp_path / "stock")
    (back := tmp_path / "back").mkdir()
    record = convert.read_record(tmp_path / "stock")
    convert.write(back, stock.model, variables_of(stock.leaves()), record)
    assert set(tensors(back)) == {*held, "lm_head.weight"}


def test_every_family_has_a_row_here_and_in_the_documentation():
    assert {kind for kind, _ in FOLDERS.values()} == set(FAMILIES)
    page = (Path(__file__).parent.parent / "docs" / "stock_checkpoints.md").read_text()
    assert [kind for kind in FAMILIES if f"| `{kind}` |" not in page] == []
