"""What a sweep's report says of made-up sweeps: known losses, known spikes, missing runs."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.sweeps import card, figures
from experiments.sweeps import report as sweep_report
from kha_jax.accounting import account
from kha_jax.analysis import comparisons, curves, style, sweeps
from kha_jax.errors import SweepError
from kha_jax.runs.results import RunResult, read_results, write_results
from kha_jax.training.run_config import RunConfig
from tests.commands import run_all

ROOT = Path(__file__).resolve().parent.parent
STEPS = (100, 200, 300)


def row(name, printed=None, baseline="baseline", note=""):
    return {"name": name, "baseline": baseline, "printed": printed, "note": note}


def finished(row, seed, loss, rate=0.003, **more):
    """A line of runs.csv."""
    curve = " ".join(f"{step}:{loss + (300 - step) / 100}" for step in STEPS)
    line = {
        "name": f"{row}-seed{seed}",
        "row": row,
        "seed": seed,
        "learning_rate": rate,
        "val_loss": loss,
        "step_seconds": 0.5,
        "spike_share": 0.01,
        "hardware": "2 cores",
        "commit": "abc1234",
        "curve": curve,
        **more,
    }
    return {**dict.fromkeys(RunResult._fields, 0), "val_accuracy": "", **line}


def write_sweep(folder, rows, lines, planned=(), logs=()):
    """A sweep folder. planned: (row, seed) of runs beside those of the lines. logs: {run: rows}."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [(line["name"], line["row"], line["seed"]) for line in lines]
    names += [(f"{row}-seed{seed}", row, seed) for row, seed in planned]
    described = {
        "title": "Table 2 at tiny scale",
        "command": "python -m experiments.sweep --table=2",
        "hardware": "2 cores",
        "commit": "abc1234",
        "rows": rows,
        "runs": [{"name": n, "row": r, "seed": s} for n, r, s in dict.fromkeys(names)],
    }
    (folder / "sweep.json").write_text(json.dumps(described))
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, RunResult._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    for name, log in dict(logs).items():
        (folder / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in log)
        (folder / name / "metrics.jsonl").write_text(text)
    return folder


def log(seed, spikes=()):
    """300 steps of a falling loss, with spikes of 2 nats."""
    random = np.random.default_rng(seed)
    lines = []
    for step in range(1, 301):
        loss = 2 + 4 * math.exp(-step / 60) + 0.03 * random.normal()
        norm = 0.5 + 0.05 * random.normal()
        if step in spikes:
            loss, norm = loss + 2, norm * 20
        lines.append({"step": step, "loss": loss, "grad_norm": norm})
    return lines


# ---------------------------------------------------------------- the card of a run


def test_a_card_says_what_a_run_is_what_it_cost_and_its_spikes(tmp_path):
    """Of an unfinished run without a checkpoint, so nothing is written."""
    config = RunConfig()
    own = account(config.model, config.seq_len)
    rows = [{**line, "tokens_per_second": 1000.0} for line in log(0, spikes=(250,))]
    rows[199] |= {"val_loss": 2.125, "val_bits_per_byte": 3.0, "val_accuracy": 0.4}
    names, said = (list(column.cells) for column in card.table(tmp_path, config, rows).columns)
    told = dict(zip(names, said))
    assert f"{own.parameters:,}" in told["parameters"]
    assert f"300 of {config.steps} steps" in told["trained"]
    assert told["validation"].startswith("2.1250 nats a token, 3.0000 bits a byte, 40.0% accuracy")
    assert told["spikes"].startswith("2, ") and "loss at 250" in told["spikes"]
    assert told["speed"].startswith("1,000 tokens a second, 0:21 h") and "on" not in told
    assert list(card.samples(tmp_path, config)) == []


# ---------------------------------------------------------------- what is read


def test_a_known_sweep_is_summed_up(tmp_path):
    """Three seeds whose offsets are common, two rows with known differences."""
    offsets = {0: 0.1, 1: -0.1, 2: 0.0}
    lines = [finished("baseline", s, 2.5 + o, step_seconds=0.5) for s, o in offsets.items()]
    noise = {0: -0.01, 1: 0.0, 2: 0.01}
    lines += [
        finished("good", s, 2.5 + o - 0.05 + noise[s], step_seconds=0.6) for s, o in offsets.items()
    ]
    lines += [finished("bad", s, 2.5 + o + 0.002 + noise[s]) for s, o in offsets.items()]
    rows = [row("baseline", 1.856), row("good", 1.832), row("bad", 1.848), row("none", 1.0)]
    sweep = sweeps.load(write_sweep(tmp_path, rows, lines, planned=[("none", 0)]))
    summary = sweeps.summarise(sweep)
    assert (summary.finished, summary.planned) == (9, 10)
    assert list(summary.results) == ["baseline", "good", "bad"]
    good, bad = summary.results["good"], summary.results["bad"]
    assert good.loss == pytest.approx(2.45) and good.difference.mean == pytest.approx(-0.05)
    assert good.difference.error == pytest.approx(0.01 / 3**0.5)
    assert good.difference.distinguishable and not bad.difference.distinguishable
    assert good.printed_difference == pytest.approx(-0.024)
    assert (good.sign_agrees, bad.sign_agrees) == (True, False)
    assert good.time_ratio == pytest.approx(1.2)
    assert summary.scatter["baseline"] == (pytest.approx(0.01), 4, 3)
    assert (summary.agreement.rows, summary.agreement.same_sign) == (2, 1)
    base = summary.results["baseline"]
    assert base.difference is None and base.sign_agrees is None and not base.differences
    curve = sweeps.curves(sweep, good, summary.loss)
    steps, values = sweeps.band(list(curve.values()))
    assert steps.tolist() == list(STEPS) and values[:, -1] == pytest.approx([2.54, 2.35, 2.46])


def test_the_best_rate_of_a_grid_is_over_the_seeds_that_all_rates_have(tmp_path):
    """0.01 is best on seed 0 alone, but has no seed 1; a run that diverged is the worst."""
    lines = [finished("baseline", s, 3.0, rate=0.003) for s in (0, 1)]
    for rate, losses in {0.001: (2.9, 2.1), 0.003: (2.8, 2.9), 0.01: (2.7,)}.items():
        lines += [
            finished("a", s, z, rate=rate, name=f"a-lr{rate}-seed{s}") for s, z in enumerate(losses)
        ]
    lines += [finished("b", 0, 2.0, rate=0.001, name="b-lr0.001-seed0")]
    lines += [finished("b", 0, math.nan, rate=0.01, name="b-lr0.01-seed0", curve="")]
    rows = [row("baseline"), row("a"), row("b")]
    summary = sweeps.summarise(sweeps.load(write_sweep(tmp_path, rows, lines)))
    a, b = summary.results["a"], summary.results["b"]
    assert (a.learning_rate, a.rates, a.losses) == (0.01, 3, {0: 2.7})
    assert a.difference.count == 1 and math.isnan(a.difference.low)
    assert (b.learning_rate, b.unfinite) == (0.001, 0)
    runs = [run for run in sweeps.load(tmp_path).finished.values() if run.row == "a"]
    assert sweeps.best_rate([run for run in runs if run.learning_rate < 0.01], "val_loss") == 0.001


def test_a_sweep_without_evaluations_is_compared_by_its_training_loss(tmp_path):
    line = {"val_loss": math.nan, "curve": ""}
    lines = [finished("baseline", 0, 0, train_loss=3.0, **line)]
    lines += [finished("a", 0, 0, train_loss=2.0, hardware="another", **line)]
    logs = {"a-seed0": log(0)}
    folder = write_sweep(tmp_path, [row("baseline"), row("a")], lines, logs=logs)
    sweep = sweeps.load(folder)
    summary = sweeps.summarise(sweep)
    a = summary.results["a"]
    assert (summary.loss, a.loss, a.learning_rate) == ("train_loss", 2.0, 0.003)
    assert math.isnan(a.time_ratio)  # times of two machines
    assert len(sweeps.curves(sweep, a, summary.loss)[0]) == 300
    assert sweeps.curves(sweep, summary.results["baseline"], summary.loss) == {}


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "sweep.json").unlink(), "sweep.json: No such file"),
        (lambda f: (f / "sweep.json").write_text('{"rows": ['), "sweep.json: is damaged"),
        (lambda f: (f / "sweep.json").write_text('{"runs": []}'), "damaged (KeyError('rows'))"),
        (lambda f: write_sweep(f, [row("a")], []), "its baseline 'baseline' is no row"),
        (lambda f: (f / "runs.csv").write_text("name,row,seed\na,b,1\n"), "is no table of runs"),
        (lambda f: replace(f / "runs.csv", ",0.003,", ",x,"), "runs.csv: line 2 is damaged"),
    ],
)
def test_a_damaged_sweep_is_named(tmp_path, damage, said):
    write_sweep(tmp_path, [row("baseline")], [finished("baseline", 0, 2.0)])
    damage(tmp_path)
    with pytest.raises(SweepError) as error:
        sweeps.load(tmp_path)
    assert said in str(error.value)


def test_figures_say_over_how_many_seeds(tmp_path):
    """A row without an interval has one too."""
    pytest.importorskip("matplotlib")
    lines = [finished("baseline", s, 2.5 + s) for s in (0, 1)]
    lines += [finished("mlp_v", s, 2.4 + 1.01 * s) for s in (0, 1)] + [finished("gate_v", 0, 2.6)]
    rows = [row("baseline", 1.856), row("mlp_v", 1.832), row("gate_v")]
    sweep = sweeps.load(write_sweep(tmp_path, rows, lines))
    summary = sweeps.summarise(sweep)
    lines = {name: sweeps.curves(sweep, one, "val_loss") for name, one in summary.results.items()}
    with style.using() as plots:
        (axes,) = comparisons.differences(summary).axes
        losses, gaps = (
            [panel.get_title() for panel in draw(summary, lines).axes if panel.get_title()]
            for draw in (comparisons.losses, comparisons.gaps)
        )
        plots.close("all")
    assert [text.get_text() for text in axes.texts] == ["n = 2", "n = 1"]
    assert losses[1:] == ["mlp_v: 2.905 (n = 2)", "gate_v: 2.600 (n = 1)"]
    assert gaps == ["mlp_v: -0.095 (n = 2)", "gate_v: +0.100 (n = 1)"]


def test_the_title_counts_the_spikes_that_are_marked():
    """Of a loss that has none and a gradient that has two, one of them not finite."""
    pytest.importorskip("matplotlib")
    lines = [{**line, "loss": 2.0} for line in log(0, (150,))]
    lines[219]["grad_norm"] = math.nan
    with style.using() as plots:
        loss, gradient = curves.stability({"baseline": lines}).axes
        plots.close("all")
    assert loss.get_title() == "baseline\nspikes: 0 in the loss, 2 in the gradient norm"
    marks = [[list(line.get_xdata()) for line in axes.lines[1:]] for axes in (loss, gradient)]
    assert marks == [[[]], [[150, 220]]]


# ---------------------------------------------------------------- the command


def report(*flags):
    line = [sys.executable, "-m", "experiments.report", *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_partial_sweep_is_reported(tmp_path):
    """Two seeds of one row, one of another that is known through the CSV alone, none of a third."""
    pytest.importorskip("matplotlib")
    lines = [finished("baseline", s, 2.5 + s) for s in (0, 1)]
    lines += [finished("mlp_v", s, 2.4 + 1.01 * s) for s in (0, 1)]
    lines += [finished("gate_v", 0, 2.6)]
    rows = [row("baseline", 1.856), row("mlp_v", 1.832), row("gate_v", 1.919, note="diverges")]
    rows += [row("absent", 1.838)]
    logs = {"baseline-seed0": log(0, (150, 151, 220)), "mlp_v-seed0": log(1)}
    folder, out = tmp_path / "sweep", tmp_path / "results" / "made"
    write_sweep(folder, rows, lines, planned=[("absent", 0), ("gate_v", 1)], logs=logs)
    done = report(f"--sweep={folder}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    text = (out / "report.md").read_text()
    assert "5 of 7 runs are finished" in text and "finished run: absent" in text
    assert "so no interval: gate_v" in text and "- gate_v: diverges" in text
    for said in ("experiments.sweep --table=2", "Hardware: 2 cores", "Commit: abc1234"):
        assert said in text
    assert "| mlp_v | baseline | 0.003 | 2 | 2.9050 | -0.0950 | -0.1585 to -0.0315 | yes |" in text
    (line,) = [line for line in csv.DictReader(open(out / "report.csv")) if line["row"] == "gate_v"]
    assert float(line["difference"]) == pytest.approx(0.1) and line["low"] == ""
    assert (out / "runs.csv").read_bytes() == (folder / "runs.csv").read_bytes()
    for name in ("differences", "gaps", "losses", "stability"):
        assert f"{name}_dark.png" in text
        assert all((out / f"{name}{end}").stat().st_size > 5000 for end in (".png", "_dark.png"))
    page = (out / "report.html").read_text()
    assert page.count("<svg") == page.count("<figure>") == 4
    assert "http-equiv" not in page and "<link" not in page and "<script" not in page
    said = "spikes: 2 in the loss, 2 in the gradient norm"
    assert said in (out / "stability.svg").read_text()


def test_spikes_of_a_log_are_listed(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"a": 1, **line}) + "\n" for line in log(0, (150, 151))))
    done = report(f"--spikes={path}", "--values=loss")
    assert done.returncode == 0, done.stderr
    assert "rolling median of the last 40 values" in done.stdout
    assert "spikes: 1; spike score 0.7143% of steps" in done.stdout
    assert "not looked at" not in done.stdout


def test_a_log_without_one_of_the_values_is_told_by_the_others(tmp_path):
    """grad_norm is absent, or never a number."""
    cases = {"absent.jsonl": {}, "null.jsonl": {"grad_norm": None}}
    for name, norm in cases.items():
        lines = ({"step": x["step"], "loss": x["loss"], **norm} for x in log(0, (150, 151)))
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [[f"--spikes={tmp_path / name}"] for name in cases]
    asked += [[*asked[0], "--values=a,grad_norm"]]
    *told, none = run_all([("report", flags) for flags in asked], tmp_path / "cache")
    for done in told:
        assert done.code == 0 and "spikes: 1; spike score 0.7143% of steps" in done.out, done.err
        (said,) = [line for line in done.out.splitlines() if line.startswith("not looked at")]
        assert said.startswith("not looked at: grad_norm; no line") and said.endswith("['loss']")
    assert none.code == 2 and none.err.count("\n") == 1
    assert "--values=a,grad_norm: no line of" in none.err and "has ['loss']" in none.err


def test_runs_of_another_config_are_left_out_and_named(tmp_path):
    lines = [finished("baseline", 0, 2.0, hash="a"), finished("linear", 0, 1.0, hash="old")]
    folder = write_sweep(tmp_path, [row("baseline"), row("linear")], lines)
    described = json.loads((folder / "sweep.json").read_text())
    described["runs"] = [{**run, "hash": "a"} for run in described["runs"]]
    (folder / "sweep.json").write_text(json.dumps(described))
    sweep = sweeps.load(folder)
    assert sweep.others == ("linear-seed0",) and list(sweep.finished) == ["baseline-seed0"]
    assert sweeps.summarise(sweep).finished == 1


def test_runs_that_are_not_planned_any_more_are_left_out_and_counted(tmp_path):
    """Three seeds were trained, then two are asked for, and a rate that is none of the grid."""
    lines = [finished(name, s, 2.0 + s) for name in ("baseline", "a") for s in range(3)]
    lines += [finished("a", 0, 0.5, rate=0.1, name="a-lr0.1-seed0")]
    folder = write_sweep(tmp_path, [row("baseline"), row("a")], lines)
    described = json.loads((folder / "sweep.json").read_text())
    described["runs"] = [
        run for run in described["runs"] if run["seed"] < 2 and "lr" not in run["name"]
    ]
    (folder / "sweep.json").write_text(json.dumps(described))
    sweep = sweeps.load(folder)
    summary = sweeps.summarise(sweep)
    assert sweep.dropped == ("a-lr0.1-seed0", "a-seed2", "baseline-seed2")
    assert (summary.finished, summary.planned) == (4, 4)
    assert (summary.results["a"].rates, summary.results["a"].losses) == (1, {0: 2.0, 1: 3.0})
    said = " ".join(sweep_report.findings(sweep, summary))
    assert "4 of 4 runs are finished" in said and "not among the planned runs: 3 (a-lr0.1" in said


def test_rates_and_costs_are_reported_where_a_sweep_has_them(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        finished(name, s, 3 - shift - 100 * rate + s, rate, name=f"{name}-lr{rate}-seed{s}")
        | {"first_loss": 5.5, "largest_logit": 40 * rate}
        for name, shift in (("baseline", 0), ("mea", 0.125))
        for rate in (1e-3, 1e-2)
        for s in (0, 1)
    ]
    lines[-1] |= {"val_loss": 9.0}
    folder = write_sweep(tmp_path / "sweep", [row("baseline"), row("mea")], lines)
    table = "variant,training_flops,step_seconds,cache_bytes\n"
    (folder / "zoo.csv").write_text(table + "baseline,100,,8\nmea,150,,12\n")
    sweep = sweeps.load(folder)
    summary = sweeps.summarise(sweep)
    assert summary.results["mea"].learning_rate == 1e-3  # of both seeds the better
    over = summary.rates["mea"]
    assert over.diverged == 0.25 and over.rates[1e-2].losses == {0: 1.875, 1: 5.5}
    said = sweep_report.as_markdown(sweep, summary, [], "")
    assert "| baseline | 2 | 0.450 | 0.450 to 0.450 | 0.01 | 0% | 3.400 | 2.500 |" in said
    assert "| 0.00015 | 1.500 | 12 | 1.500 |" in said
    told = list(csv.DictReader(sweep_report.rates_csv(summary).splitlines()))
    assert [float(line["largest_logit"]) for line in told] == [0.04, 0.4] * 2
    assert [line["spikes_per_1000_steps"] for line in told] == ["10.0"] * 4
    draws = figures.of_sweep(sweep, summary)
    assert {"costs", "rates"} < draws.keys()
    with style.using():
        axes = draws["costs"]().axes
        ratios = [line.get_xdata()[-1] for line in axes[1].lines if line.get_marker() == "o"]
        assert ratios == [1.5] and len(axes) == 3  # no times, which were not measured
        panels = draws["rates"]().axes
        ends = {tuple(line.get_ydata()) for line in panels[1].lines}
        assert (3.4, 2.5) in ends and (3.275, 3.6875) in ends and (3.6875,) in ends
    for text, message in (
        ("variant,loss\nmea,2\n", "is no table of experiments.zoo"),
        (table + "mea,150,2,12\n", "has mea and not baseline, its baseline"),
        (table + "baseline,0,1,8\n", "baseline: a cost is not above 0"),
        ("parameters," + table + "7,baseline,1,1,8\n", "baseline has 7 parameters, its runs have"),
    ):
        (folder / "zoo.csv").write_text(text)
        with pytest.raises(SweepError, match=message):
            sweeps.load(folder)
    (folder / "zoo.csv").write_text(table + "baseline,1,2,8\nmea,1,3,8\nanother,1,,8\n")
    (_, mea) = sweeps.summarise(sweeps.load(folder)).results.values()
    assert mea.time_ratio == 1.5


def test_rows_are_corrected_for_their_number(tmp_path):
    """By Holm: of a and b one is left that was below by its own interval."""
    noise = {"a": (0.010, 0.011, 0.012), "b": (0.010, 0.03, 0.05), "baseline": (0, 0, 0)}
    lines = [finished(name, s, 2 - d[s]) for name, d in noise.items() for s in range(3)]
    sweep = sweeps.load(write_sweep(tmp_path, [row(name) for name in sorted(noise)], lines))
    summary = sweeps.summarise(sweep)
    own = [summary.results[name].difference.p for name in "ab"]
    assert summary.holm == {"a": 2 * own[0], "b": own[1]} and own[0] < own[1]
    said = sweep_report.findings(sweep, summary)
    assert "By Holm's correction for these 2 rows, below: a; above: none." in said
    line = next(csv.DictReader(sweep_report.as_csv(sweep, summary).splitlines()))
    assert float(line["p_by_holm"]) == 2 * float(line["p"]) == 2 * own[0]


def test_a_table_of_runs_is_written_as_it_was_read(tmp_path):
    """Also that of other data than text, which has empty cells, as have columns that are new."""
    for kept in ("table2_tiny_dense", "tasks_tiny"):
        table = ROOT / "results" / kept / "runs.csv"
        write_results(tmp_path / "runs.csv", read_results(table))
        before, after = (
            [dict.fromkeys(RunResult._fields, "") | line for line in csv.DictReader(open(path))]
            for path in (table, tmp_path / "runs.csv")
        )
        assert before == after


def test_a_table_of_runs_that_is_cut_off_is_damaged(tmp_path):
    folder = write_sweep(tmp_path, [row("baseline")], [finished("baseline", 0, 2.0)])
    text = (folder / "runs.csv").read_text()
    (folder / "runs.csv").write_text(text[: text.index(",2.0,")])
    with pytest.raises(SweepError, match="line 2 is damaged"):
        sweeps.load(folder)
