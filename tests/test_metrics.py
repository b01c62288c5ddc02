"""Sinks: what JSON cannot say, lines that were cut, and failures that must not stop a run."""

import io
import json
import math
import time

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from experiments.cli import terminal
from experiments.cli.terminal import Terminal
from experiments.train_loop import progress
from kha_jax import metrics, spikes
from kha_jax.analysis.reading import read_metrics
from kha_jax.attention import AttentionConfig
from kha_jax.attention.scores import TalkingHeads
from kha_jax.errors import CheckpointError, StorageError
from kha_jax.metrics import MetricsFile, Spared, TensorBoard, read_lines
from kha_jax.model import AttentionFrom, ModelConfig
from kha_jax.spikes import Spikes
from kha_jax.training.run_config import RunConfig


def test_what_is_not_finite_is_null(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write(1, {"loss": math.nan, "layers": [1.0, math.inf], "grad_norm": -math.inf})
    file.close()

    def refuse(name):
        raise AssertionError(name)

    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "layers": [1.0, None], "grad_norm": None}


def test_a_resumed_file_holds_the_whole_lines_up_to_its_step(tmp_path):
    path = tmp_path / "m.jsonl"
    whole = ['{"step": 1, "loss": NaN}', '{"step": 2}', '{"step": 3}']
    broken = ['{"step": 2, "lo', "[]", "3", '{"step": "1"}', "{}", "\ufffd\0", ""]
    path.write_text("\n".join([whole[0], *broken, *whole[1:]]))
    file = MetricsFile(path, 2)
    assert file.last == {"step": 2}
    file.write(3, {"loss": 1.0})
    file.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_line_that_did_not_fit_does_not_spoil_the_next(tmp_path):
    class Full:
        def write(self, line):
            self.part = line[:5]
            inner.write(self.part)
            return 5

    file = MetricsFile(tmp_path / "m.jsonl", 0)
    inner, file.file = file.file, Full()
    with pytest.raises(OSError, match="No space left"):
        file.write(1, {})
    file.file = inner
    file.write(2, {})
    file.close()
    assert list(read_lines(tmp_path / "m.jsonl")) == [{"step": 2}]


class Failing:
    def write(self, step, values):
        raise OSError("full")

    def close(self):
        raise OSError("still full")


def no_folder():
    raise NotADirectoryError("a file is there")


def test_a_sink_that_fails_is_counted_and_told_of_once(caplog):
    for make, lost in ((Failing, 4), (no_folder, 4)):
        caplog.clear()
        sink = Spared("the sink", make)
        for step in range(3):
            sink.call("write", step, {})
        sink.close()
        assert sink.lost == lost
        assert [r.getMessage().split(":")[0] for r in caplog.records] == [
            "the sink cannot be written, training goes on",
            "the sink",
        ]


@pytest.mark.slow  # tensorboardX takes seconds to import
@pytest.mark.parametrize("place", ["/dev/full", "a file"])
def test_tensorboard_fails_at_once_instead_of_waiting(tmp_path, place, monkeypatch):
    """The package's own queue waits for ever; a folder that is a file is no folder."""
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "tensorboard"
    if place == "a file":
        folder.write_text("")
        with pytest.raises(OSError):
            TensorBoard(folder, 0)
        return
    board = TensorBoard(folder, 0)
    board.write(0, {"loss": 1.0, "layers": [1.0, 2.0]})
    assert sum(p.stat().st_size for p in folder.iterdir()) > 100
    board.writer._py_recordio_writer._writer = open(place, "wb")
    with pytest.raises(OSError):
        board.write(1, {"loss": 1.0})


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, monkeypatch):
    """By its own reader: the first session goes beyond the checkpoint that the second begins at."""
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    began = time.time()
    for session, (first, last) in enumerate([(0, 7), (4, 9)]):
        monkeypatch.setattr(time, "time", lambda: began + 10 * session)  # files of their own
        board = TensorBoard(tmp_path, first)
        for step in range(first + 1, last + 1):
            board.write(step, {"loss": 10.0 * session + step})
        board.close()
    assert len(list(tmp_path.iterdir())) == 2
    shown = reader.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in shown] == list(range(1, 10))
    assert [event.value for event in shown] == [1, 2, 3, 4, 15, 16, 17, 18, 19]


def test_a_terminal_that_is_gone_counts_what_nobody_saw(tmp_path):
    terminal = Terminal(open("/dev/full", "w"))
    for _ in range(3):
        print("a line", file=terminal, flush=True)
    assert terminal.gone and terminal.lost == 2
    terminal.stream.close()
    needed = Terminal(open("/dev/full", "w"), needed=True)
    with pytest.raises(StorageError, match="the output cannot be written: No space"):
        print("a line", file=needed, flush=True)
    needed.stream.close()


def test_a_table_is_shown_in_parts_that_fit():
    """Each no wider than the terminal, no number broken, no cell lost, for any width."""
    table = Table(title="what it is of")
    names = ("flags", *(f"number {letter}" for letter in "abcdefghi"))
    rows = [("--a=1 --bcd=23", *(f"{i * 10**j:,}" for j in range(9))) for i in (1, 2)]
    for name in names:
        table.add_column(name, justify="left" if name == "flags" else "right")
    for row in rows:
        table.add_row(*row)
    assert terminal.parts(table, 300) == [table]
    for width in (30, 60, 80):
        screen = Console(width=width, file=io.StringIO())
        parts = terminal.parts(table, width)
        assert len(parts) > 1
        for part in parts:
            screen.print(part)
        text = screen.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        words = text.replace("│", " ").split()
        assert all(words.count(cell) == 1 for row in rows for cell in row[1:])


def test_progress_counts_no_compilation_and_evaluations_fit_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    steps = 238_418
    shown = progress.Progress(first_step=10, steps=steps, enabled=True)
    for step, seconds in ((11, 5000), (12, 2), (22, 20)):  # two seconds a step
        now[0] += seconds
        rates = {"tokens_per_second": 12_345_678.0, "model_flops_utilization": 0.4}
        shown.update(step, {"loss": 12.345, "grad_norm": 1.0, "max_violation": [1.0, 2], **rates})
    shown.update(22, {"val_loss": 1.234, "val_bits_per_byte": 1.234, "val_accuracy": 0.1234})
    first, later, evaluation = capsys.readouterr().out.splitlines()
    left = "132:27 left"
    assert "left" not in first and later.endswith(left) and evaluation.endswith(left)
    assert "MaxVio 2.00" in later and "accuracy 12.3%" in evaluation and len(evaluation) <= 80


def test_long_rows_whose_scores_meet_are_warned_of():
    talking = ModelConfig(attention=AttentionConfig(probabilities=TalkingHeads()))
    later = ModelConfig(later=AttentionFrom(attention=talking.attention))
    for model, seq_len, warned in (
        (talking, 4096, True),
        (later, 2048, True),
        (talking, 512, False),
        (ModelConfig(), 4096, False),
    ):
        told = progress.of_scores(RunConfig(model=model, seq_len=seq_len))
        assert told.startswith("heads mix in the scores") if warned else told == ""


@pytest.mark.parametrize("length", [300, 1500])
def test_spikes_are_the_same_while_a_series_grows_and_afterwards(length):
    """Both rules, on noise with a spike, a hole and a new level, which is not an endless alarm."""
    values = 1 + 0.1 * np.sin(np.arange(length))
    values[[200, 205]], values[250:] = (4.0, math.nan), 3.0
    rule = spikes.spike_rule(length)
    live = Spikes(rule)
    noticed = [live.centre_before(float(value)) for value in values]
    afterwards = rule.marks(rule.away(values)[0]) & np.isfinite(values)
    assert [one is not None for one in noticed] == afterwards.tolist()
    assert noticed[200] == pytest.approx(1, abs=0.1) and noticed[205] is None
    assert noticed[250] is not None and noticed[-1] is None
    assert metrics.plain((1, [math.nan])) == [1, [None]]


def test_spikes_are_found_sized_and_timed_on_a_made_log():
    """Noise of 0.05 around 2, one spike of three steps up to 4, one step that is not finite, one
    level that stays; a falling loss has none."""
    random = np.random.default_rng(0)
    values = 2 + 0.05 * random.normal(size=300)
    values[[100, 101, 102]] = 3.0, 4.0, 2.5
    values[150] = math.nan
    values[250:] += 1
    steps = np.arange(10, 3010, 10)
    first, second, level = spikes.find_spikes(steps, values, "loss")
    assert (first.name, first.step, first.peak, first.recovery) == ("loss", 1010, 4.0, 30)
    assert first.size == pytest.approx(2, abs=0.05) and first.times == pytest.approx(2, rel=0.02)
    assert first.spreads == pytest.approx(2 / 0.05, rel=0.4)
    assert second.step == 1510 and math.isnan(second.peak) and second.recovery == 10
    assert level.step == 2510 and level.recovery is None
    falling = 2 + 4 * np.exp(-np.arange(300) / 60) + 0.03 * random.normal(size=300)
    assert spikes.find_spikes(steps, falling) == []
    falling[150] += 1
    assert [one.step for one in spikes.find_spikes(steps, falling)] == [1510]


def test_the_spike_score_of_a_long_run_is_the_definition():
    """Of OLMo 2: 7 standard deviations from the mean of the last 1000, either way; against the
    words in numpy."""
    random = np.random.default_rng(0)
    losses, norms = random.normal(size=(2, 1500))
    losses[[700, 1300]], norms[[1300, 1400]], norms[50] = 40.0, -40.0, 99.0
    rows = [
        {"step": step, "loss": float(a), "grad_norm": float(b)}
        for step, (a, b) in enumerate(zip(losses, norms))
    ]
    words = {
        i
        for z in (losses, norms)
        for i in range(100, 1500)
        if abs(z[i] - z[max(0, i - 1000) : i].mean()) >= 7 * z[max(0, i - 1000) : i].std()
    }
    assert words == {700, 1300, 1400}  # 50 has too little history
    assert spikes.spike_score(rows) == pytest.approx(3 / 1400)
    assert spikes.spike_score(rows, ["loss"]) == pytest.approx(2 / 1400)
    assert "mean of the last 1000" in spikes.spike_rule(len(rows)).describe()
    assert math.isnan(spikes.spike_score(rows[:20]))
    assert math.isnan(spikes.spike_score(rows, ["nothing"]))


def test_constant_values_have_no_spikes_and_null_is_one():
    rows = [{"step": i, "loss": 1.0} for i in range(60)]
    assert spikes.spike_score(rows) == 0
    rows[50]["loss"] = None
    rows.append({"step": 59, "val_loss": 3.0})  # an evaluation's line
    assert spikes.spike_score(rows) == pytest.approx(1 / 40)
    assert metrics.column([{"step": 2, "a": [1, 3.0]}, {"step": 1, "a": 2}], "a")[1].tolist() == [
        2,
        3,
    ]


def test_a_report_draws_what_is_there(tmp_path):
    """Cut lines, a run without an evaluation, steps that were not finite; an empty run is named."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"s'
    )
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2}]
    for content in ("", "\0\0", '{"step": 1, "loss": "high"}'):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(CheckpointError, match="metrics.jsonl holds no loss"):
            read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match="none/metrics.jsonl: No such file"):
        read_metrics(tmp_path / "none")
