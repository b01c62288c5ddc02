"""Where the time of a run goes, and who is slow: sums that must come out, and words of processes
that are made up; on runs where that is slow."""

import json
import random
import re
import signal
import statistics
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments.train_loop.stop import SAVE_DUE, SaveVote
from kha_jax.analysis import curves
from kha_jax.runs import goodput, pace, watchdog
from kha_jax.runs.goodput import DONE_AGAIN, KINDS, Goodput
from kha_jax.runs.pace import Pace, hanging, stragglers
from kha_jax.runs.watchdog import Watchdog
from tests.runs import SMALL, finish, joined, lines, manifests, start, steps_done, wait_for


class Clock:
    """time.time() of a run that is made up."""

    def __init__(self):
        self.now = 1e9

    def time(self):
        return self.now


@pytest.mark.parametrize("seed", range(5))
def test_seconds_sum_to_the_time_since_the_run_began(seed, tmp_path, monkeypatch):
    """Through kills at any moment: of a step that counts its last run counts, and no other."""
    monkeypatch.setattr(goodput, "time", clock := Clock())
    chance, path, saved, kills = random.Random(seed), tmp_path / "metrics.jsonl", 0, 4
    began, counted = clock.now, {}

    def spend():
        seconds = chance.uniform(0.1, 5)
        clock.now += seconds
        return seconds

    while saved < 40:
        watch, first = Goodput(clock.now), saved
        spend()
        watch.go_on(path, saved)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if saved else []
        rows = [row for row in rows if row["step"] <= saved]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        killed = first + chance.randrange(1, 25) if kills else 1000
        for step in range(first + 1, 41):
            watch.enter("data_wait")
            spend()
            watch.enter("steps" if step > first + 1 else "compile")
            counted[step] = spend() if step > first + 1 else 0.0
            watch.enter("steps")
            row = {"step": step, "time": clock.now}
            if step == first + 1 or step % 8 == 0:
                row |= watch.values()
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            watch.step = step
            if step % 8 == 0:
                with watch.at("save"):
                    spend()
                saved = step
            if step == killed:
                break
        if step == killed:
            kills -= 1
            spend()  # until somebody starts it again
            continue
    with watch:
        pass
    seconds = goodput.of(json.loads(path.read_text().splitlines()[-1]))
    assert seconds.keys() == set(KINDS)
    assert sum(seconds.values()) == pytest.approx(clock.now - began, abs=0.1)
    assert seconds["steps"] == pytest.approx(sum(counted.values()), abs=0.1)
    assert seconds["lost"] > 0 and seconds["down"] > 0
    assert goodput.share(seconds) < 1 and f"of {clock.now - began:.1f} s" in goodput.spelt(seconds)


def test_metrics_of_before_have_no_times():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "time": None, "goodput/steps": 1.0}]
    assert goodput.carried(rows, 1) == (dict.fromkeys(KINDS, 0.0), None)
    assert set(DONE_AGAIN) < set(KINDS)


def test_the_figure_stacks_every_kind():
    pytest.importorskip("matplotlib")
    rows = [{"step": 1, "loss": 1.0, "time": 5.0}]
    for step in (2, 3):
        rows.append(
            {"step": step, "time": 9.0 * step, **{f"goodput/{k}": 60.0 * step for k in KINDS}}
        )
    figure = curves.time_spent({"run": rows})
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        kind.replace("_", " ") for kind in ("steps", *(k for k in KINDS if k != "steps"))
    ]
    top = max(path.vertices[:, 1].max() for area in axes.collections for path in area.get_paths())
    assert top == pytest.approx(3 * len(KINDS))  # minutes


def test_the_process_began_before_this_test():
    assert 0 < time.time() - goodput.process_began() < 24 * 3600


class Table:
    def __init__(self):
        self.words = {}

    def key_value_set(self, key, word, allow_overwrite):
        self.words[key] = word

    def key_value_dir_get(self, prefix):
        return list(self.words.items())


def reports(seed, slow, count=4, steps=200):
    """What process 0 logs of so many steps; slow: a process that takes twice as long."""
    table, chance = Table(), random.Random(seed)
    all_of = [Pace(table, index, count) for index in range(count)]
    for step in range(1, steps + 1):
        own = [0.2 * chance.uniform(0.8, 1.2) * (1 + (who == slow)) for who in range(count)]
        for who, one in enumerate(all_of):
            one.times.append((own[who], max(own)))
            if step % pace.STEPS == 0:
                times, one.times = one.times, []
                one.report = (step, *map(statistics.median, zip(*times)))
                one.tell()
        all_of[0].listen(all_of[0].told(), now=step / 20)


def test_a_slow_process_is_named_within_two_reports_and_none_of_healthy_ones(caplog, monkeypatch):
    monkeypatch.setattr(pace.log, "propagate", True)
    for seed in range(5):
        reports(seed, slow=None)
    assert not caplog.records
    reports(0, slow=2)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("process 2 is slow: ") and "until step 40)" in said


def test_who_waits_for_devices_is_not_slow():
    """Ten times the others' own part of a step, which is a hundredth of it."""
    assert stragglers({0: 0.001, 1: 0.01, 2: 0.001}, step=1.0) == set()
    assert stragglers({0: 0.1, 1: 0.9, 2: 0.1}, step=1.0) == {1}


def test_steps_are_timed_without_what_they_wait_for():
    one = Pace(Table(), 0, 2)
    for number in range(1, pace.STEPS + 2):
        one.step(number)
        with one.waiting():
            time.sleep(0.01)
    _, own, whole = one.report
    assert own < 0.005 < 0.01 <= whole


def test_a_process_that_is_silent_is_mentioned_once_and_when_it_is_back(caplog, monkeypatch):
    monkeypatch.setattr(pace.log, "propagate", True)
    table = Table()
    one, other = Pace(table, 0, 2), Pace(table, 1, 2)
    for now in range(0, 60, 2):
        one.tell()
        if not 10 < now <= 24:
            other.tell()
        one.listen(one.told(), float(now))
    silent, back = [record.getMessage() for record in caplog.records]
    assert silent == "process 1 has not answered for 10 s: it is stopped"
    assert back == "process 1 answers again, after 16 s"


def test_the_process_that_hangs_is_named():
    def word(number, at, waits):
        return [number, at, waits, None]

    before = {0: word(3, 7, True), 1: word(3, 7, True), 2: word(2, 7, True)}
    after = {0: word(5, 7, True), 1: word(5, 8, False), 2: word(2, 7, True)}
    assert hanging(before, after) == "; process 2 does not answer, process 1 is at step 8 by itself"
    assert "all processes answer" in hanging(before, {0: word(5, 7, True)})
    assert Pace(None, 0, 1).who_hangs() == ""


def test_a_stop_of_the_whole_process_is_mentioned(caplog, monkeypatch):
    monkeypatch.setattr(watchdog.log, "propagate", True)
    with Watchdog(60.0, print) as guard:
        time.sleep(0.05)
        with guard.changed:
            guard.clock = guard.clock[0], time.monotonic() - 13  # the last look is long ago
            guard.changed.notify()
        time.sleep(0.2)
    assert re.search(r"stopped for 1[12] s during the start", caplog.text)


def test_a_vote_is_a_value_on_all_devices(monkeypatch):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    assert SaveVote(0.0, mesh).cast() == {}
    vote = SaveVote(1.0, mesh)
    assert vote.cast()[SAVE_DUE].tolist() == 0
    vote.since -= 61
    assert vote.cast()[SAVE_DUE].tolist() == 1
    vote.saved()
    assert vote.cast()[SAVE_DUE].tolist() == 0


# ---------------------------------------------------------------- on runs
@pytest.mark.slow
def test_goodput_of_a_run_that_is_killed_twice_sums_to_wall_time(cache, tmp_path):
    """And once before the first line of a start, which forgets nothing of those before."""
    began = time.time()
    for kill in (22, 16, 41, None):
        fault = f"kill:step:{kill}" if kill else ""
        code, _, err = finish(start(cache, tmp_path, fault=fault), 1200)
        assert code == (-signal.SIGKILL if kill else 0), err
        if kill == 16:
            last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
            assert last["step"] == 15 and goodput.of(last)["lost"] > 0
    ended = time.time()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    seconds, wall = goodput.of(last), last["time"] - began
    assert 0 <= ended - last["time"] < 5  # what the interpreter takes to leave
    (said,) = [line for line in err.splitlines() if line.startswith("goodput ")]
    print(f"\n{said}\nwall time {wall:.1f} s, sum {sum(seconds.values()):.1f} s")
    assert abs(sum(seconds.values()) - wall) < 0.02 * wall
    assert seconds["lost"] > 0 and seconds["down"] > 0
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == list(range(1, 61))


@pytest.mark.slow
def test_checkpoints_by_the_clock_and_for_good(cache, tmp_path):
    """Two processes save the same steps, though one clock decides."""
    flags = ("--config.checkpoint.every=0", "--config.checkpoint.every_minutes=0.02")
    more = ("--config.checkpoint.keep=1", "--config.checkpoint.keep_every=25")
    fault = ",".join(f"drag:step:{step}" for step in range(30, 36))
    both = [start(cache, tmp_path, *flags, *more, *join, fault=fault) for join in joined(2)]
    for process in both:
        code, _, err = finish(process, 1200)
        assert code == 0, err
    assert [int(path.parent.name) for path in manifests(tmp_path)] == [25, 50, 60]


@pytest.mark.slow
def test_a_slow_process_and_one_that_is_stopped_are_named_on_a_run(cache, tmp_path):
    fault = ",".join(f"drag:batch:{step}" for step in range(2, 90))
    base = (*SMALL, "--config.steps=4000", "--config.evaluation.every=0")
    faults = ("", fault)
    both = [
        start(cache, tmp_path, *join, base=base, fault=one) for join, one in zip(joined(2), faults)
    ]
    wait_for(lambda: steps_done(tmp_path) > 60, both[0])
    both[1].send_signal(signal.SIGSTOP)
    time.sleep(15)
    both[1].send_signal(signal.SIGCONT)
    time.sleep(6)
    both[1].send_signal(signal.SIGTERM)
    (code, _, err), (other_code, _, other_err) = (finish(process, 600) for process in both)
    assert (code, other_code) == (75, 75), (err, other_err)
    assert "[0] process 1 is slow: " in err and "process 0 is slow" not in err, err
    assert "[0] process 1 has not answered for 10 s" in err, err
    assert "[0] process 1 answers again" in err and "[1] stopped for 1" in other_err, other_err
