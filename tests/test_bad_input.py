"""What cannot work ends with one line on stderr, the contract's exit code, nothing compiled and no
traceback: the command line, config files, run folders, data, prompts.

Every row is a command as a user types it (see tests.commands); all of them are run once.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from kha_jax.runs.manifest import sealed
from tests.commands import ROOT, run_all
from tests.runs import SMALL

TINY = (
    *SMALL,
    "--config.steps=2",
    "--config.model.layers=1",
    "--config.evaluation.every=0",
    "--config.checkpoint.every=1",
)
HEADS = "--config.model.attention.projection"
MOE = "--config=configs/kha_moe_tiny.py"

# ---------------------------------------------------------------- the command line of train
# flags: what the line on stderr says; all of them are 2
FLAGS = {
    "--config.stepz=3": "config.stepz: is not a known field; did you mean 'steps'?",
    "--config.model.attention.valeu.kind=mlp": "did you mean 'value'?",
    "--config.model.attention.value.kind=mpl": "did you mean 'mlp'?",
    "--config.data.source=python": "did you mean 'python_source'?",
    "--config.data.source=a/b --config.data.folder=c": "config.data.folder another",
    "--config.data.source=s3://b/shards": "s3:// is not supported",
    "--config.steps=many": "config.steps: expected int, found 'many'",
    "--config.steps many": "config.steps",
    "--config.steps=2.5": "config.steps: expected int, found '2.5'",
    "--config.steps=0": "config.steps: must be at least 1, found 0",
    "--config.steps=1000000000": "config.steps: must be below 10^9",
    "--config.steps=9999999999999999999999": "config.steps: must fit in 64 bits",
    "--config.steps=": "config.steps: expected int, found ''",
    "--config.steps.more=1": "config.steps is a single value",
    "--config.model=3": "config.model: is a group of fields",
    "--config.seed=-1": "config.seed: must be in [0, 2^32), found -1",
    "--config.accumulation=3": "config.accumulation: must divide batch_size=16, found 3",
    "--config.hang_timeout=0": "config.hang_timeout: must be at least 1",
    "--config.checkpoint.keep=0": "config.checkpoint.keep: must be at least 1",
    "--config.profile.start=3 --config.profile.stop=2": "must be greater than start=3",
    "--config.optimizer.learning_rate=inf": "learning_rate: must be finite",
    "--config.optimizer.weight_decay=1e39": "weight_decay: must be finite",
    "--config.optimizer.eps=nan": "eps: must be finite",
    "--config.optimizer.b1=1.5": "config.optimizer.b1: must be in [0, 1), found 1.5",
    "--config.data.held_out=inf": "held_out: must be finite",
    "--config.data.held_out=2": "held_out: must be between 0 and 1",
    "--config.data.cache_dir=gs://bucket/data": "object stores are not supported",
    "--config.data.source=mqar --config.data.gap_power=inf": "gap_power: must be finite",
    "--config.data.source=mqar --config.data.pairs=99": "config.seq_len: must be at least 396",
    "--config.data.source=mqar --config.data.examples=9223372036854775807": "data.examples: must",
    "--config.model.width=1000000000": "config.model: has ",
    "--config.model.layers=1000000000": "config.model: has ",
    "--config.model.vocabulary_size=1000000000000": "config.model: has ",
    "--config.model.feed_forward.width=1000000000": "config.model: has ",
    f"{HEADS}.query_heads=1000000000": "config.model: has ",
    f"{HEADS}.head_dim=1000000000": "config.model: has ",
    "--config.seq_len=1000000000": "config.seq_len: with batch_size / accumulation makes",
    "--config.batch_size=1000000000": "config.seq_len: with batch_size / accumulation makes",
    f"{HEADS}.kv_heads=3": "must divide query_heads=8, found 3",
    f"{HEADS}.head_dim=7": "head_dim: must be even",
    f"{HEADS}.kind=latent": "value.kind: KnockingMLP cannot stand here",
    "--config.model.attention.kernel=cudnn": "kernel: 'cudnn' runs on a gpu, found cpu",
    "--config.model.numerics.dtype=float99": "config.model.numerics.dtype: 'float99'",
    "--config.model.later.kind=from --config.model.later.layer=9": "must be below layers=4",
    "--config.model.loss.chunk_tokens=0": "chunk_tokens: must be at least 1",
    f"{MOE} --config.model.feed_forward.top_k=99": "feed_forward.top_k: must",
    "--config.mesh.data=3": "does not make 1 devices",
    "--config.mesh.preset=nowhere": "config.mesh.preset: 'nowhere' is not known",
    "--config=configs/kha_moe_6b.py": "157,184 ids for data that has 264, in a run of 999,998M",
    "--config=kha_tiny": "no file kha_tiny; did you mean configs/kha_tiny.py?",
    "--steps=100": "--steps is not a known flag; did you mean --config.steps?",
    "--config.lr=1": "config.lr: is not a known field; did you mean config.optimizer.learning_rate",
    "--config configs/none.py": "no file configs/none.py",
    "--config=configs": "no file configs",
    "--config={here}/pipe.py": "no file ",
    "--config": "--config: names no file",
    "--config=": "--config: names no file",
    "--config=configs/kha_tiny.py:": "--config=configs/kha_tiny.py:: names no variant; write",
    "--config=configs/kha_tiny.py --config=configs/mqar_tiny.py --config.steps=3": "--config="
    "configs/mqar_tiny.py: there is --config=configs/kha_tiny.py too",
    f"--config={'n' * 300}": "no file nnn",
    "--config.=2": "config.: is not a known field; use one of accumulation, ",
    "--config.a-b=2": "config.a-b: is not a known field",
    "--config.step\x1b[31ms=2": r"config.step\x1b[31ms: is not a known field; did you mean 's",
    f"--{'n' * 300}=2": "nnn is not a known flag",
    "--config.optimizer.learning_rate=1e24": "learning_rate: must be at most 1000, found 1e+24",
    "--config=configs/kha_tiny.py:mlpp": "config variant 'mlpp' is not known",
    "--config configs/kha_tiny.py --config.attention.kv_heads=2": "did you mean "
    "config.model.attention.projection.kv_heads?",
    "--flagfile=/etc/hostname": "--flagfile and --undefok: are not read",
    "--undefok=x --x=3": "--flagfile and --undefok: are not read",
    "--workdirs=x": "did you mean 'workdir'?",
    "again": "'again' is not understood",
    "--workdir=gs://bucket/../run": "--workdir=gs://bucket/../run: is no name of a store",
    "--workdir=file:///tmp/run": "object stores but gs://BUCKET/NAME are not supported",
    "--workdir=": "--workdir=: names no folder; is a variable of the shell not set?",
    "--workdir={here}/run/checkpoints": "lies in the checkpoints of the run {here}/run; name that",
    "--workdir={here}/run/checkpoints/00000001/new": "lies in the checkpoints of the run",
    "--workdir=S3://bucket/run": "object stores but gs://BUCKET/NAME are not supported",
    "--workdir={here}/text": "cannot be written: ",
    "--workdir={here}/" + "n" * 300: "cannot be written: File name too long",
    "--workdir={here}/\udcff": "the name is not UTF-8",
    "--allow_changes=stepz": "--allow_changes=stepz: is no field; did you mean 'steps'?",
    "--num_processes=2": "--coordinator_address: is needed together with --num_processes",
    "--num_processes=2 --process_id=2 --coordinator_address=h:1": "must be below --num_processes=2",
    "--num_processes=2 --process_id=0 --coordinator_address=h": "must be HOST:PORT",
    "--num_processes=2 --process_id=0 --coordinator_address=localhost:{port}": "process 0 cannot "
    "listen there: Address already in use",
    "--num_processes=2 --process_id=0 --coordinator_address=h:99999": "h:99999: process 0 cannot",
    "--replay_step=0": "replay_step",
    "--replay_step=1 --workdir={here}/none": "no run there",
}

# ---------------------------------------------------------------- config files
FILES = {
    "def get_config(:\n": "line 1: SyntaxError",
    "import nothing_of_that_name\n": "line 1: ModuleNotFoundError: No module named",
    "\n1 / 0\n": "line 2: ZeroDivisionError: division by zero",
    "def get_config():\n    return {}['steps']\n": "line 2: KeyError: 'steps'",
    "def get_config():\n    return None\n": "get_config returns a NoneType, expected a ConfigDict",
    "get_config = 3\n": "TypeError: 'int' object is not callable",
    "import sys\nsys.exit()\n": "line 2: SystemExit",
    "raise OSError('two\\nlines')\n": "line 1: OSError: two lines",
    "steps = 3\n": "defines no get_config(variant)",
    "": "defines no get_config(variant)",
    "\x00\x01\udcff": "null bytes",
    "seulement du français\udcff": "SyntaxError",
    "import ml_collections\ndef get_config():\n"
    "    return ml_collections.ConfigDict({'model': 3})\n": "config.model: expected fields of",
    "import ml_collections\ndef get_config():\n"
    "    return ml_collections.ConfigDict({'steps': 'many'})\n": "config.steps: expected int",
}


# ---------------------------------------------------------------- a run's folder, and what reads it
def write(name, content):
    def damage(run):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(errors="surrogateescape"))

    return damage


def edited(run):
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["model"]["attention"]["projection"]["rope_theta"] = 10.0
    path.write_text(json.dumps(config))


def manifest(change):
    def damage(run):
        path = run / "checkpoints" / "00000002" / "MANIFEST.json"
        changed = change(json.loads(path.read_text()))
        path.write_text(json.dumps(sealed(changed) if isinstance(changed, dict) else changed))
        shutil.rmtree(run / "checkpoints" / "00000001")

    return damage


def foreseen(batch):
    """The run has one more step to go."""

    def damage(run):
        shutil.rmtree(run / "checkpoints" / "00000002")
        path = run / "checkpoints" / "00000001" / "MANIFEST.json"
        path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "next_batch": batch})))

    return damage


def in_place_of(name, make):
    """A pipe or a device, which nobody may wait for or read for ever."""

    def damage(run):
        (run / name).unlink()
        make(run / name)

    return damage


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def no_damage(run):
    pass


def remove(pattern):
    def damage(run):
        for path in run.glob(pattern):
            path.unlink()

    return damage


def of_the_cache(name, content):
    """Damages the tokens, of which each such row has its own copy."""

    def damage(run):
        (folder,) = run.glob("tokens/python_shards-1/train-*")
        path = folder / name
        path.write_bytes(content(path.read_bytes()))

    return damage


GENERATE = ("generate", "--workdir={run}", "--prompt=def ")
TRAIN = ("train", *TINY, "--workdir={run}")
OWN_DATA = (
    *TRAIN,
    "--config.steps=3",
    "--allow_changes=steps",
    "--config.data.cache_dir={run}/tokens",
)
# name: what is done to the run, the command, its exit code, what it says
INPUTS = {
    "no workdir": (no_damage, ("generate", "--prompt=a"), 2, "--workdir: is required"),
    "no such run": (no_damage, ("generate", "--prompt=a", "--workdir=none"), 2, "no run there"),
    "a bucket": (no_damage, ("generate", "--prompt=a", "--workdir=gs://b/run"), 2, "of a bucket"),
    "a name too long": (no_damage, (*GENERATE, f"--workdir={'n' * 300}"), 2, "no run there"),
    "no prompt": (no_damage, GENERATE[:2], 2, "--prompt: is required"),
    "an empty prompt": (no_damage, (*GENERATE, "--prompt="), 2, "--prompt: is empty"),
    "a long prompt": (no_damage, (*GENERATE, f"--prompt={'x' * 100_000}"), 2, "64 times the 64"),
    "many tokens": (no_damage, (*GENERATE, "--tokens=1000000000"), 2, "64 times the 64"),
    "no tokens": (no_damage, (*GENERATE, "--tokens=0"), 2, "tokens"),
    "a cold start": (no_damage, (*GENERATE, "--temperature=-1"), 2, "--temperature"),
    "no top": (no_damage, (*GENERATE, "--temperature=1", "--top_k=0"), 2, "--top_k"),
    "no nucleus": (no_damage, (*GENERATE, "--temperature=1", "--top_p=0"), 2, "--top_p"),
    "a step that is not kept": (no_damage, (*GENERATE, "--step=9"), 2, "not kept"),
    "a negative seed": (no_damage, (*GENERATE, "--seed=-1"), 2, "seed"),
    **{
        f"config.json is {content[:9]!r}, {command[0]}": (
            write("config.json", content),
            command,
            2,
            "config.json: is damaged",
        )
        for content in ("[]", "3", "null", "", "\udcff", "[" * 10_000, '{"model": null}')
        for command in ((GENERATE, TRAIN) if content == "[]" else (GENERATE,))
    },
    "lineage.json is a number": (
        write("lineage.json", "3"),
        GENERATE,
        2,
        "lineage.json: is damaged",
    ),
    **{
        f"the manifest is {str(value)[:20]}": (
            manifest(lambda _, value=value: value),
            GENERATE,
            74,
            "none of the checkpoints [2] is intact",
        )
        for value in ([], 3, None, {"files": []}, {"files": {"a": 1}}, {"files": {}}, {"step": 2})
    },
    "the manifest's step is a list": (manifest(lambda m: {**m, "step": [2]}), TRAIN, 74, "intact"),
    "another config's manifest": (manifest(lambda m: {**m, "config": 3}), TRAIN, 74, "intact"),
    **{
        f"another config's manifest, checkpoints {flag}": (
            manifest(lambda m: {**m, "config": 3}),
            ("checkpoints", "--workdir={run}", flag),
            74,
            "is of another run: its config is 3",
        )
        for flag in ("--leaves=2", "--diff=2,2")
    },
    "no manifest": (remove("checkpoints/*/MANIFEST.json"), TRAIN, 74, "no manifest is left"),
    "a foreseen batch of the wrong kind": (
        foreseen(3),
        TRAIN,
        65,
        "is not the checkpoint's 3",
    ),
    **{
        f"meta.json is {content[:9]!r}": (
            of_the_cache("meta.json", lambda _, content=content: content),
            OWN_DATA,
            65,
            said,
        )
        for content, said in {
            b"[]": "meta.json is no object",
            b"{}": "meta.json is of version None, this program reads 1",
            b"[" * 10_000: "meta.json cannot be read",
        }.items()
    },
    "tokens are cut": (
        of_the_cache("train-00000.bin", lambda b: b[:99]),
        OWN_DATA,
        65,
        "bin holds 99 bytes",
    ),
    "tokens are reversed": (
        of_the_cache("train-00000.bin", lambda b: b[::-1]),
        OWN_DATA,
        65,
        "train-00000.bin differs from its checksum",
    ),
    "checksums are a pickle": (
        of_the_cache("train-00000.crc", lambda _: b"\x80\x04."),
        OWN_DATA,
        65,
        "train-00000.crc is cut",
    ),
    "checkpoints of no run": (no_damage, ("checkpoints", "--workdir={here}"), 2, "no run there"),
    "checkpoints of a bucket": (no_damage, ("checkpoints", "--workdir=gs://b"), 2, "of a bucket"),
    "one step to compare": (
        no_damage,
        ("checkpoints", "--workdir={run}", "--diff=1"),
        2,
        "two steps",
    ),
    "words to compare": (
        no_damage,
        ("checkpoints", "--workdir={run}", "--diff=a,b"),
        2,
        "is no checkp",
    ),
    "all to remove": (
        no_damage,
        ("checkpoints", "--workdir={run}", "--prune=1,2"),
        2,
        "no good check",
    ),
    "report of nothing": (no_damage, ("report",), 2, "--workdir: name at least one"),
    "report of no run": (no_damage, ("report", "--workdir={here}/none"), 2, "metrics.jsonl: "),
    "report of a bucket": (no_damage, ("report", "--workdir=s3://b"), 2, "object stores"),
    "empty metrics": (
        write("metrics.jsonl", ""),
        ("report", "--workdir={run}"),
        2,
        "holds no loss",
    ),
    "cut metrics": (
        write("metrics.jsonl", '{"step": 1, "lo'),
        ("report", "--workdir={run}"),
        2,
        "holds no loss",
    ),
    "metrics of the wrong kind": (
        write("metrics.jsonl", '[1]\n{"step": 1, "loss": "low"}\n'),
        ("report", "--workdir={run}"),
        2,
        "holds no loss",
    ),
    "an unknown figure": (
        no_damage,
        ("report", "--workdir={run}", "--out={run}/a.xyz"),
        2,
        "must end",
    ),
    "a figure in a file": (
        no_damage,
        ("report", "--workdir={run}", "--out={here}/text/a.png"),
        2,
        "cannot be written",
    ),
    "three reports": (
        no_damage,
        ("report", "--workdir={run}", "--spikes={run}"),
        2,
        "name one of them",
    ),
    "a report of no sweep": (
        no_damage,
        ("report", "--sweep={run}", "--out={here}/new"),
        2,
        "sweep.json: No such file",
    ),
    "a report of a sweep nowhere": (no_damage, ("report", "--sweep={run}"), 2, "--out: name the"),
    "spikes of a pipe": (no_damage, ("report", "--spikes={here}/pipe.py"), 2, "no regular file"),
    "known results of a device": (
        no_damage,
        ("sweep", "--configs=configs/kha_tiny.py", "--known=/dev/zero"),
        2,
        "cannot be read: it is no regular file",
    ),
    "metrics that are a device": (
        in_place_of("metrics.jsonl", device),
        ("report", "--workdir={run}"),
        2,
        "no regular file",
    ),
    "a lineage that is a device": (
        in_place_of("lineage.json", device),
        TRAIN,
        2,
        "no regular file",
    ),
    "a manifest that is a pipe": (
        in_place_of("checkpoints/00000002/MANIFEST.json", pipe),
        (*GENERATE, "--step=2"),
        74,
        "no regular file",
    ),
    "spikes of no log": (no_damage, ("report", "--spikes={here}/none"), 2, "cannot be read: No"),
    "spikes of no value": (
        no_damage,
        ("report", "--spikes={run}", "--values=losss"),
        2,
        "--values=losss: no line",
    ),
    "no command": (no_damage, ("convert",), 2, "'no command': is not a command"),
    "another command": (no_damage, ("convert", "folde"), 2, "did you mean 'fold'?"),
    "no place to convert to": (
        no_damage,
        ("convert", "fold", "--workdir={run}"),
        2,
        "--out: is req",
    ),
    "a bucket to convert to": (
        no_damage,
        ("convert", "fold", "--workdir={run}", "--out=gs://b"),
        2,
        "object stores",
    ),
    "a run to convert to": (
        no_damage,
        ("convert", "fold", "--workdir={run}", "--out={run}"),
        2,
        "already holds check",
    ),
    "a sweep of no file": (no_damage, ("sweep", "--configs=nope"), 2, "--configs: no file nope"),
    "a sweep of no variant": (
        no_damage,
        ("sweep", "--configs=configs/kha_tiny.py:melp"),
        2,
        "--configs=configs/kha_tiny.py: config variant 'melp' is not known",
    ),
    "a rate that a grid sets too": (
        no_damage,
        ("sweep", "--table=2", "--set=config.optimizer.learning_rate=1", "--learning_rates=1,2"),
        2,
        "--set=config.optimizer.learning_rate=1: sets the same as --learning_rates=1,2",
    ),
    "analyze of a damaged config": (
        write("config.json", "[3]"),
        ("analyze", "--workdir={run}"),
        2,
        "config.json: is damaged",
    ),
    **{
        f"a config that was edited, {words[0]} {words[-1]}": (
            edited,
            words,
            65,
            "config.json: model.attention.projection.rope_theta=10.0 is not what lineage.json rec",
        )
        for words in (
            GENERATE,
            TRAIN,
            (*TRAIN, "--replay_step=2"),
            ("convert", "fold", "--workdir={run}", "--out={here}/folded"),
            ("analyze", "--workdir={run}"),
            ("checkpoints", "--workdir={run}"),
            ("report", "--workdir={run}", "--out={here}/report.png"),
        )
    },
    "analyze of nothing": (no_damage, ("analyze",), 2, "--workdir: is required"),
    "analyze of no folder": (no_damage, ("analyze", "--workdir={here}/none"), 2, "no such folder"),
    "analyze of odd storage": (no_damage, ("analyze", "--workdir=odd://a"), 2, "storage is known"),
    "analyze to a bucket": (no_damage, ("analyze", "--workdir={run}", "--out=S3://b"), 2, "stores"),
    "a sweep to a bucket": (no_damage, ("sweep", "--table=2", "--out=Gs://b"), 2, "object stores"),
    "a sweep to nowhere": (
        no_damage,
        ("sweep", "--table=2", "--out="),
        2,
        "--out=: names no folder",
    ),
    "a plan of no slice": (no_damage, ("plan", "--topology=v9:1x1"), 2, "v9:1x1"),
    "a plan in 5 dimensions": (
        no_damage,
        ("plan", "--topology=v5p:2x2x2x2x2"),
        2,
        "'v5p:2x2x2x2x2' is no slice: a v5p has 3 dimensions, as v5p:",
    ),
    "a plan in 3 of 2": (no_damage, ("plan", "--topology=v5e:1x1x1"), 2, "2 dimensions, as v5e:"),
    "a ranking of one": (
        no_damage,
        ("plan", "--fastest", "--config.accumulation=2"),
        2,
        "--config.accumulation=2",
    ),
}
PREPARE = ("prepare_data", "--input={here}/text", "--out={here}/shards")
INPUTS |= {
    " ".join((*command, *flags)): (no_damage, (*command, *flags), code, said)
    for command, flags, code, said in (
        (PREPARE[:2], (), 2, "--out is required"),
        (PREPARE[::2], (), 2, "--input is required"),
        (PREPARE[::2], ("--input={here}/none*.txt",), 2, "none*.txt: means no file that is read"),
        (PREPARE[::2], ("--input={here}/none.txt",), 2, "none.txt cannot be read: No such file"),
        (
            PREPARE[::2],
            ("--input={here}/bad.jsonl",),
            65,
            "bad.jsonl:2: has no 'text'; its keys: 'a'",
        ),
        (PREPARE[:2], ("--out={here}/run",), 2, "--out={here}/run: holds something else"),
        (PREPARE[:2], ("--out={here}/text",), 2, "--out={here}/text cannot be written: "),
        (PREPARE, ("--tokenizer=bpe:many",), 2, "--tokenizer=bpe:many: must be bpe:N with N above"),
        (PREPARE, ("--tokenizer=bpe:12",), 2, "such as bpe:16384"),
        (PREPARE, ("--tokenizer=a.json,ends=b",), 2, "'ends' is neither end= nor begin="),
        (PREPARE, ("--tokenizer=nothing.json",), 2, "name a tokenizer.json"),
        (PREPARE, ("--tokenizer=spiece.model",), 2, "sentencepiece models are not read"),
        (PREPARE, ("--val_fraction=1",), 2, "--val_fraction=1.0: must be at least 0, below 1"),
        (PREPARE, ("--workers=0",), 2, "--workers=0: must be 1 to 1,024"),
        (PREPARE, ("--skip_bad=-1",), 2, "--skip_bad=-1: must not be negative"),
        (PREPARE[:1], ("--describe={here}/run",), 2, "holds no meta.json, no .bin and no .npy"),
    )
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that holds a good `run` and the file `text`; the cache."""
    here, cache = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("cache")
    (here / "text").write_text("no folder")
    (here / "bad.jsonl").write_text('{"text": "good"}\n{"a": "bad"}\n')
    pipe(here / "pipe.py")
    ((code, _, err, _),) = run_all([("train", [*TINY, f"--workdir={here / 'run'}"])], cache)
    assert code == 0, err
    return here, cache


@pytest.fixture(scope="module")
def results(trained):
    """What each command of the tables left with, by name."""
    (here, cache), cases = trained, {}
    taken = socket.create_server(("", 0))
    for flags in FLAGS:
        arguments = flags.replace("{here}", str(here)).split(" ")
        arguments = [a.replace("{port}", str(taken.getsockname()[1])) for a in arguments]
        place = [] if "--workdir" in flags else [f"--workdir={here / 'new'}"]
        cases[flags] = "train", [*arguments, *place][:: -1 if flags == "--config" else 1]
    for number, content in enumerate(FILES):
        path = here / f"config_{number}.py"
        path.write_bytes(content.encode(errors="surrogateescape"))
        cases[content] = "train", [f"--config={path}", f"--workdir={here / 'new'}"]
    for number, (name, (damage, command, _, _)) in enumerate(INPUTS.items()):
        run = here / f"run_{number}"
        if damage is not no_damage:
            shutil.copytree(here / "run", run)
            if command is OWN_DATA:
                shutil.copytree(cache / "data", run / "tokens")
            damage(run)
        else:
            run = here / "run"
        told = [part.replace("{run}", str(run)).replace("{here}", str(here)) for part in command]
        cases[name] = told[0], told[1:]
    found = dict(zip(cases, run_all(list(cases.values()), cache)))
    taken.close()
    assert not (here / "new" / "checkpoints").exists()
    return found


def assert_refused(result, code, said):
    assert result.code == code and said in result.err and result.seconds < 3, result
    lines = result.err.strip().splitlines()
    assert "Traceback" not in result.err and lines[-1].startswith("error: "), result.err
    assert len(lines) == 1 or all(line.startswith("passed over") for line in lines[:-1]), lines


@pytest.mark.parametrize("flags", FLAGS, ids=ascii)
def test_bad_flags(trained, results, flags):
    assert_refused(results[flags], 2, FLAGS[flags].replace("{here}", str(trained[0])))


@pytest.mark.parametrize("content", FILES, ids=ascii)
def test_bad_config_files(results, content):
    assert_refused(results[content], 2, FILES[content])


@pytest.mark.parametrize("name", INPUTS, ids=ascii)
def test_bad_inputs(trained, results, name):
    if name not in ("report of nothing",) and INPUTS[name][1][0] == "report":
        pytest.importorskip("matplotlib")
    code, said = INPUTS[name][2:]
    assert_refused(results[name], code, said.replace("{here}", str(trained[0])))


# ---------------------------------------------------------------- output that is the product
FULL = 74, "error: the output cannot be written: No space left on device\n"
CLOSED = 74, "error: the output cannot be written: Bad file descriptor\n"
# a command, where its output goes, and with what it ends and says
OUTPUTS = [
    (("plan", "--json"), ">/dev/full", FULL),
    (("train", "--print_config"), ">/dev/full", FULL),
    (("train", "--print_config"), ">&-", CLOSED),
    (("train", "--print_config"), "| true", (0, "")),
    (("train", "--help"), ">/dev/full", FULL),
    (("train", "--config.help"), ">/dev/full", FULL),
    (("checkpoints", "--workdir={run}"), ">/dev/full", FULL),
    (("checkpoints", "--workdir={run}"), "| true", (0, "")),
    (GENERATE, ">/dev/full", FULL),
    (TRAIN, ">/dev/full", (0, "")),  # of which the product is the run
]


def test_output_that_is_the_product_is_there_or_missed(trained):
    here, cache = trained
    told = [[part.replace("{run}", str(here / "run")) for part in case[0]] for case in OUTPUTS]
    cases = [(name, [*flags, place]) for (name, *flags), (_, place, _) in zip(told, OUTPUTS)]
    for case, expected, result in zip(cases, OUTPUTS, run_all(cases, cache)):
        lines = [line for line in result.err.splitlines(True) if line.startswith("error: ")]
        assert (result.code, "".join(lines)) == expected[2], (case, result)
        assert "Traceback" not in result.err and "Exception" not in result.err, result


def test_streams_that_are_closed_from_the_start_are_no_traceback(tmp_path):
    """Nor are their numbers those of the files that a command opens."""
    python = f"cd {ROOT}; {sys.executable} -m experiments"
    said, number, file = (tmp_path / name for name in ("said", "number", "config.py"))
    file.write_text(f"with open({str(number)!r}, 'w') as f: f.write(str(f.fileno()))\n1 / 0")
    lines = {
        f"{python} >&- 2>{said}": 74,
        f"{python} >/dev/full 2>&-": 74,
        f"{python}.train --config={file} <&- >&- 2>&-": 2,
        f"{python}.train --print_config >&- 2>&-": 74,
    }
    begun = {line: subprocess.Popen(["sh", "-c", line]) for line in lines}
    assert {line: process.wait(timeout=60) for line, process in begun.items()} == lines
    assert said.read_text() == CLOSED[1] and int(number.read_text()) > 2


# ---------------------------------------------------------------- by itself
def begin(command, *arguments, **streams):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    line = [sys.executable, "-m", f"experiments.{command}", *arguments]
    return subprocess.Popen(line, cwd=ROOT, text=True, **streams)


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_leaves_without_a_word(tmp_path, command, number):
    process = begin(command, f"--workdir={tmp_path / 'run'}", "--prompt=a")
    maps = f"/proc/{process.pid}/maps"
    while "multiarray" not in open(maps).read():  # numpy is there, jax is on its way
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -number and not out and not err


@pytest.mark.slow
def test_odd_names_of_folders_are_names(tmp_path):
    """Rich's markup, a URL's and a shell's special characters, other alphabets."""
    names = "-a b*", "[red]x[/blue]", "50%41 a?b#c", "knöcking"
    cases = [("train", [*TINY, f"--workdir={tmp_path / name}"]) for name in names]
    for name, result in zip(names, run_all(cases, tmp_path / "cache")):
        assert result.code == 0 and str(tmp_path / name) in result.out, result
    cases = [("checkpoints", [f"--workdir={tmp_path / name}", "--verify"]) for name in names]
    for result in run_all(cases, tmp_path / "cache"):
        assert result.code == 0 and result.out.count("yes") == 2, result


@pytest.mark.slow
def test_odd_prompts_and_unevaluated_runs_are_no_errors(trained):
    """Escapes are understood, bytes that are no UTF-8 taken as they are."""
    here, cache = trained
    prompts = "--prompt=a\\n\\tb", "--prompt=a\\\\n", "--prompt=\udcff", "--prompt=knöcking"
    cases = [("generate", [f"--workdir={here / 'run'}", "--tokens=2", *prompts])]
    cases += [("report", [f"--workdir={here / 'run'}", f"--out={here / 'figure.png'}"])]
    told, drawn = run_all(cases, cache)
    assert told.code == 0 and "Traceback" not in told.err, told.err
    for shown in (r"--- 'a\n\tb'", r"--- 'a\\n'", "--- '\ufffd'", "--- 'knöcking'"):
        assert shown in told.out, told.out
    if importlib.util.find_spec("matplotlib"):
        assert drawn.code == 0 and (here / "figure.svg").exists(), drawn.err


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_text(trained):
    here, _ = trained
    flags = f"--workdir={here / 'run'}", "--prompt=def main(", "--tokens=4000", "--temperature=1"
    process = begin("generate", *flags)
    assert process.stdout.read(1) == "d"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Traceback" not in err and "Exception" not in err, err
