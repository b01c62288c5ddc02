"""Plans: the analytic half against the numbers it must reach, golden plans of the presets, and the
compiled half where libtpu is."""

import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kha_jax import planning
from kha_jax.config import ConfigError, from_dict
from kha_jax.hardware import tpu
from kha_jax.hardware.chips import SLICES, TPUS
from kha_jax.mesh import MeshConfig
from kha_jax.ops.attention import KERNELS
from kha_jax.planning import SliceError, faster, fastest, placed, plan, remedies, topology
from kha_jax.planning.memory import Compiled
from kha_jax.planning.search import MARGIN, settings
from kha_jax.training.run_config import RunConfig
from tests import published

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def config(variant="mlp", name="kha_moe_6b"):
    return from_dict(
        RunConfig, runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](variant)
    )


def planned(variant="mlp", where="v5p-128", sequences=4, name="kha_moe_6b"):
    slice_ = topology(where)
    return plan(placed(config(variant, name), slice_, sequences), slice_, compiled=False)


def test_the_main_run_reaches_half_of_the_peak_and_knocking_costs_next_to_nothing():
    baseline, linear, mlp = (planned(variant) for variant in ("baseline", "linear", "mlp"))
    assert mlp.roofline.mfu >= 0.5 and mlp.roofline.bound == "compute"
    assert 1 < mlp.roofline.step_seconds / baseline.roofline.step_seconds <= 1.01
    assert 1 < linear.roofline.step_seconds / baseline.roofline.step_seconds <= 1.001
    assert mlp.memory.peak / baseline.memory.peak < 1.01
    assert round(mlp.params_total / 1e9, 1) == 6.1 and mlp.memory.fits


def test_experts_that_are_split_have_rows_for_the_tokens_of_all_their_devices():
    run, slice_ = config().replace(accumulation=8), topology("v5p-128")
    run = run.replace(model=run.model.replace(remat="inner"))
    whole, split = (
        plan(run.replace(mesh=MeshConfig(expert=size)), slice_, False) for size in (1, 4)
    )
    moe, bfloat16 = run.model.feed_forward, 2
    inner = moe.inner_floats(run.model.width) * run.tokens_per_step / run.accumulation / 64
    added = split.memory.activation - whole.memory.activation
    assert added == pytest.approx((4 - 1) * inner * run.model.layers * bfloat16, rel=0.06)


def test_scores_of_all_heads_are_planned_for_where_heads_meet():
    """Talking heads hold and move scores that fused kernels never write, and multiply them."""
    talking, plain = (
        planned(variant, "v5e-64", 8, "dense_600m") for variant in ("talking", "baseline")
    )
    assert talking.memory.temporary > 1.2 * plain.memory.temporary
    assert talking.roofline.hbm_seconds > 2 * plain.roofline.hbm_seconds
    added = talking.flops_per_step - plain.flops_per_step
    maps, layers, heads, tokens = 2, 24, 32, 512 * 4096
    assert added == 3 * maps * layers * 2 * heads**2 * (4096 + 1) / 2 * tokens


@pytest.mark.parametrize("variant", ["mea", "mixture", "differential", "collaborative"])
def test_every_mechanism_has_a_plan(variant):
    plan = planned(variant, "v5e-64", 1, "dense_600m")
    plain = planned("baseline", "v5e-64", 1, "dense_600m")
    assert plan.params_total != plain.params_total and plan.roofline.step_seconds > 0


def test_queries_and_keys_that_are_wider_than_values_take_their_room():
    """Collaborative heads: 32 weighed copies of a shared query and key of 4096, per token."""
    baseline, wide = (
        planned(variant, sequences=1, name="dense_600m")
        for variant in ("baseline", "collaborative")
    )
    more = wide.memory.temporary - baseline.memory.temporary
    assert more > 4096 * 2 * 32 * 4096 * 2  # tokens, q and k, heads, width, bytes


def test_state_shrinks_with_the_chips_and_moves_with_the_micro_batches():
    small, large = planned(where="v5p-64"), planned(where="v5p-128")
    assert abs(small.memory.params / large.memory.params - 2) < 0.02
    assert small.memory.optimizer / small.memory.params == pytest.approx(2, rel=0.01)
    assert (small.accumulation, large.accumulation) == (4, 2)
    assert small.moved["all-gather"] / large.moved["all-gather"] == pytest.approx(2, rel=0.03)
    assert small.roofline.chip_hours == pytest.approx(large.roofline.chip_hours, rel=0.01)


@pytest.mark.parametrize("where", SLICES)
def test_preset_matches_its_golden_plan(where):
    large = topology(where).chips >= 32
    run, sequences = config(name="kha_moe_6b" if large else "dense_600m"), 1
    presets = runpy.run_path(str(ROOT / "configs" / "kha_moe_6b.py"))["PRESETS"]
    assert presets.keys() <= SLICES.keys() and large == (where in presets)
    if large:
        remat, accumulation = presets[where]["model.remat"], presets[where]["accumulation"]
        # a preset is what the command ranks first
        assert fastest(run, topology(where), compiled=0)[0].changes == presets[where]
        run = run.replace(model=run.model.replace(remat=remat), accumulation=accumulation)
        sequences = None
    found = plan(placed(run, topology(where), sequences), topology(where), compiled=False)
    assert found.memory.fits
    text = json.dumps(found.as_dict(), indent=1) + "\n"
    golden = ROOT / "tests" / "golden" / f"plan_{where}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.exists(), f"{golden} is missing; write it with UPDATE_GOLDEN=1"
    expected = json.loads(golden.read_text())
    for key, value in json.loads(text).items():
        close = expected[key] if isinstance(value, str) else pytest.approx(expected[key])
        assert value == close, f"{key}; rewrite with UPDATE_GOLDEN=1"


def test_names_and_batches_that_do_not_work_are_refused():
    for bad in ("v7:2x2", "v5p", "v5p:4x", "v5p-12"):
        with pytest.raises(SliceError, match=bad):
            topology(bad)
    for bad, meant in (("v5p-32", "v5p:2x2x4"), ("v5e-32", "v5e:4x8"), ("v6e-16", "v6e:4x4")):
        with pytest.raises(SliceError, match=f"; {meant} is the slice of that size"):
            topology(bad)
    with pytest.raises(
        ConfigError,
        match="^batch_size: must be a multiple of 192, 3 on each of 64 devices, found 512",
    ):
        planned(sequences=3)


def test_remedies_come_from_the_cheapest_on():
    """Through the policies and the sequences at once by the step to expect, then larger slices."""
    run, slice_ = config(), topology("v5e-64")
    run = placed(run.replace(model=run.model.replace(remat="dots")), slice_, 4)
    plans = [(r, plan(r.config, r.slice_, compiled=False)) for r in remedies(run, slice_)]
    here = [(remedy, found) for remedy, found in plans if not remedy.moved_to]
    expected = [found.expected.step_seconds for _, found in here]
    assert all(later >= 0.99 * first for first, later in itertools.pairwise(expected))
    fitting = [remedy for remedy, found in plans if found.memory.fits]
    assert fitting[0].changes == {"model.remat": "projections", "accumulation": 4}
    assert {remedy.config.model.remat for remedy, _ in here} == {
        *("inner", "projections", "attention", "full")
    }
    alone = [remedy.changes for remedy in fitting if "accumulation" not in remedy.changes]
    assert alone == [{"model.remat": "full"}]
    room = (1 + MARGIN) * slice_.chip.hbm_bytes
    assert all(found.memory.peak <= room for _, found in plans)
    assert {remedy.moved_to for remedy, _ in plans[len(here) :]} == {"v5e-256"}
    assert plans[len(here)][0].changes == {"accumulation": 2}
    assert all(remedy.config.batch_size == 512 for remedy, _ in plans)


@pytest.mark.parametrize(
    ("mesh", "moved"),
    [
        ({"preset": "v5e-64"}, {"mesh.preset": "v5e-256"}),
        ({"data": 64}, {"mesh.data": -1}),
        ({"data": 16, "expert": -1}, {}),
        ({"data": -1, "model": 4}, {}),
    ],
)
def test_a_larger_slice_comes_with_what_the_mesh_then_needs(mesh, moved):
    run, slice_ = config(), topology("v5e-64")
    *_, last = remedies(placed(run.replace(mesh=MeshConfig(**mesh)), slice_, 1), slice_)
    assert last.moved_to == "v5e-256"
    assert {k: v for k, v in last.changes.items() if k != "accumulation"} == moved
    assert math.prod(last.config.mesh.sizes(256).values()) == 256


def test_a_preset_of_one_device_is_advised_slices_by_their_presets():
    run = config(name="dense_600m")
    run = placed(run.replace(mesh=MeshConfig(preset="1-device")), topology("v5e-1"), 1)
    assert [
        (remedy.moved_to, remedy.changes["mesh.preset"])
        for remedy in remedies(run, topology("v5e-1"))
    ] == [(name, name) for name in ("v5e-4", "v5e-64", "v5e-256")]


def test_what_the_compiler_wanted_is_read_from_its_complaint():
    wanted = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, temporaries "
        "(21.40G) exceeds available HBM (15.75G)."
    )
    assert planning.memory.needed(wanted) == 21.4 * GIB
    assert (
        planning.memory.needed("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: 17.1M") is None
    )
    assert planning.memory.needed("INTERNAL: HBM (1.0G)") is None


def test_a_larger_batch_sees_the_same_tokens():
    run = placed(config(), topology("v5p-64"), 32)
    assert run.batch_size == 1024 and run.steps == config().steps // 2


def test_a_fixed_mesh_is_kept_or_refused_by_name():
    run = config()
    tensor = placed(run.replace(mesh=MeshConfig(data=-1, model=4)), topology("v5p-64"), 4)
    assert tensor.accumulation == 512 // (4 * 8)
    moved = plan(tensor, topology("v5p-64"), compiled=False).moved
    assert moved["all-reduce"] > 100 * planned(where="v5p-64").moved["all-reduce"]
    with pytest.raises(ConfigError, match="^mesh.preset: 'v5p-128' has 64 devices, found 32"):
        placed(run.replace(mesh=MeshConfig(preset="v5p-128")), topology("v5p-64"), 4)


def command(*flags):
    line = [sys.executable, "-m", "experiments.plan", *flags]
    done = subprocess.run(
        line,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_prints_json_and_says_what_would_fit():
    code, out, err = command(
        "--topology=v5e-64", "--sequences_per_device=16", "--nocompile", "--json"
    )
    assert (
        code == 0
        and "fits with --config.accumulation=4 --config.batch_size=1024 --config.steps=119209: "
        in err
    ), err
    found = json.loads(out)
    assert "expected_step_seconds" in found
    promised = (
        "params_total params_active peak_bytes_per_device hbm_bytes_per_device fits "
        "flops_per_step step_seconds mfu"
    )
    assert {*promised.split(), "tokens_per_second", "chip_hours", "source"} <= set(found)
    assert found["source"] == "analytic" and found["fits"] is False


def test_the_command_ranks_settings_with_the_flags_of_each():
    code, out, err = command("--topology=v5e-64", "--fastest", "--nocompile", "--json")
    assert code == 0, err
    plans = json.loads(out)["plans"]
    best = next(p["flags"] for p in plans)
    code, out, err = command("--topology=v5e-64", "--nocompile", "--json", *best)
    assert code == 0 and err == "", err  # nothing faster to advise
    alone = json.loads(out)
    assert alone == {name: value for name, value in plans[0].items() if name != "flags"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "sequences", "limit"),
    [("v5p-64", 4, 11.0), ("v5e-64", 6, 15.75), ("v6e-64", 4, 10.0)],
)
def test_the_main_run_fits_by_xlas_own_analysis(where, sequences, limit):
    pytest.importorskip("libtpu", reason="needs the extra: pip install -e '.[plan]'")
    slice_batch = topology(where).chips * sequences
    code, out, err = command(
        f"--topology={where}",
        f"--sequences_per_device={sequences}",
        f"--config.batch_size={slice_batch}",
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["source"] == "compiled" and found["peak_bytes_per_device"] <= limit * GIB


def test_what_divides_nowhere_or_fits_nowhere_is_told_apart():
    assert fastest(config(), topology("v5e-1"), compiled=3) == []  # nothing is worth compiling
    with pytest.raises(ConfigError, match="batch_size: must be a multiple of 64"):
        fastest(config().replace(batch_size=500), topology("v5p-128"), compiled=0)


def test_the_fastest_setting_keeps_what_fits():
    """From the sizes alone: bounds of 73, 62 and 70%."""
    for where, goal in (("v5p-128", 0.73), ("v5e-64", 0.62), ("v6e-64", 0.70)):
        slice_ = topology(where)
        found = fastest(config(), slice_, compiled=0)
        assert max(setting.plan.roofline.mfu for setting in found[:3]) >= goal
        per_token = [s.plan.expected.step_seconds / s.config.tokens_per_step for s in found]
        assert all(later >= 0.99 * first for first, later in itertools.pairwise(per_token))
        assert all(s.plan.memory.peak <= slice_.chip.hbm_bytes for s in found)
        chosen = found[0].config
        flags = {"model.remat": chosen.model.remat, "accumulation": chosen.accumulation}
        assert found[0].changes == flags and chosen.batch_size == 512
    now = plan(placed(config(), slice_, None), slice_, compiled=False)
    assert faster(config(), slice_, now).config == chosen
    assert faster(config(), slice_, found[0].plan) is None


def test_meshes_are_searched_where_they_are_asked_for():
    run, slice_ = config(), topology("v5e-4")
    run = run.replace(batch_size=8, model=run.model.replace(layers=2, vocabulary_size=1024))
    meshes = {
        tuple(setting.config.mesh.sizes(4).values())
        for setting in settings(run, slice_, sequences=1, meshes=True)
    }
    assert {(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 4, 1), (1, 2, 2)} == meshes
    assert len(settings(run, slice_, sequences=1, remat="inner")) == 1


def test_settings_that_xla_refuses_are_not_offered(monkeypatch):
    """The compiler's word counts where there is one: it is asked until something fits."""
    slice_, asked = topology("v5p-128"), []

    def compiled_memory(run, slice_):
        asked.append(run.model.remat)
        return Compiled((96.0 if len(asked) < 4 else 50.0) * GIB, 1.0, 1.0)

    monkeypatch.setattr(planning.memory, "compiled_memory", compiled_memory)
    found = fastest(config(), slice_, compiled=2)
    assert len(asked) == 4 and found[0].plan.source == "compiled"
    assert found[0].plan.memory.peak == 50 * GIB
    assert {setting.plan.source for setting in found[1:]} == {"analytic"}


@pytest.mark.parametrize("run", published.RUNS, ids=lambda run: f"{run.name} on {run.where}")
def test_expected_steps_are_near_what_others_measured(run):
    """Within 15% wherever the run computes what the plan counts; constants are few and shared."""
    slice_ = topology(run.where)
    placed_run = placed(run.run(slice_.chips), slice_, run.sequences)
    expected = plan(placed_run, slice_, compiled=False).expected.step_seconds
    tokens = placed_run.tokens_per_step / expected / slice_.chips
    assert abs(tokens / run.tokens_per_second - 1) <= (0.15 if run.same else 0.3)


def test_slices_over_the_network_wait_for_it():
    one, two = (planned(where=where, sequences=1) for where in ("v5p-128", "2*v5p-128"))
    assert (two.chips, two.topology) == (128, "2*v5p:4x4x4")
    assert one.roofline.network_seconds == 0 < two.roofline.network_seconds
    assert two.expected.step_seconds > one.expected.step_seconds / 2


def test_every_chip_and_kind_of_model_has_settings(monkeypatch):
    monkeypatch.delenv(tpu.ENVIRONMENT, raising=False)
    assert tpu.SETTINGS.keys() == TPUS.keys()
    for chip, row in tpu.SETTINGS.items():
        assert row.keys() == {"dense", "mixture"}
        for kind, found in row.items():
            assert found.kernel in KERNELS and tpu.VMEM in found.options
            assert tpu.settings(chip, kind == "mixture") == found
    for elsewhere in (None, "v4", "NVIDIA H200", "cpu"):
        assert tpu.settings(elsewhere, True) == (None, {})


def test_what_the_environment_names_is_left_to_it(monkeypatch):
    table = tpu.SETTINGS["v5p"]["mixture"]
    monkeypatch.setenv(tpu.ENVIRONMENT, "--xla_a=1 --xla_b")
    assert tpu.settings("v5p", True) == table
    monkeypatch.setenv(tpu.ENVIRONMENT, f"--xla_a=1 --{tpu.VMEM}=16384")
    kernel, options = tpu.settings("v5p", True)
    # large blocks need the limit that the table would have set
    assert kernel is None and options == {k: v for k, v in table.options.items() if k != tpu.VMEM}


def test_a_run_is_compiled_with_the_kernel_of_its_chip_where_that_pays(monkeypatch):
    monkeypatch.delenv(tpu.ENVIRONMENT, raising=False)
    long, short = config(), config(name="dense_600m")
    assert long.tuned("v5p")[0].kernels("tpu") == {"attention": "splash_2048"}
    assert short.tuned("v5p")[0].kernels("tpu") == {"attention": "splash"}  # rows of 4096
    assert long.tuned(None) == (long, (None, {}))
    off = long.replace(mesh=MeshConfig(tuning="none"))
    assert off.tuned("v5p") == (off, (None, {}))
    named = long.model.with_attention(lambda a: a.replace(kernel="splash"))
    assert long.replace(model=named).tuned("v5p")[0].model == named


COMPILE_ALL = """
import jax, jax.numpy as jnp
from experiments.plan import leave_chips_alone
from jax.experimental import topologies
from kha_jax.hardware import chips, tpu
from kha_jax.ops.attention import attention
leave_chips_alone()
for chip, slice_ in {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}.items():
    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=slice_).devices
    assert chips.chip_of(device.device_kind) == chip
    place = jax.sharding.SingleDeviceSharding(device)
    q, k = (jax.ShapeDtypeStruct((1, 8192, n, 128), jnp.bfloat16, sharding=place) for n in (2, 1))
    ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=place)
    for kind, found in tpu.SETTINGS[chip].items():
        def run(q, k, v, ids, do):
            read = lambda *qkv: attention(*qkv, ids, kernel=found.kernel, platform="tpu")
            return jax.vjp(read, q, k, v)[1](do)
        lowered = jax.jit(run, compiler_options=found.options).lower(q, k, k, ids, q)
        print(chip, kind, lowered.compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_libtpu_takes_the_settings_and_the_kernel_fits_its_memory():
    """Attention of a row of 8192, forward and backward, for every chip and kind of model."""
    pytest.importorskip("libtpu", reason="needs the extra: pip install -e '.[plan]'")
    line = [sys.executable, "-c", COMPILE_ALL]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.slow
def test_the_command_prints_what_steps_are_compiled_with():
    code, out, err = command("--topology=v5p-128", "--untuned", "--nocompile")
    assert code == 0, err
    options = tpu.SETTINGS["v5p"]["mixture"].options
    assert tpu.told(["splash_2048"], options) in out and tpu.told(["splash"], {}) in out
