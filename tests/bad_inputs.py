"""Run folders and data that cannot work: what is done to a good run, the command, its exit code and
what it says."""

import json
import os
import shutil

from kha_jax.runs.manifest import sealed
from tests.bad_lines import PREPARED, TINY


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
    "analyze of odd storage": (no_damage, ("analyze", "--workdir=odd://a"), 2, "object stores"),
    "analyze to a bucket": (no_damage, ("analyze", "--workdir={run}", "--out=S3://b"), 2, "stores"),
    "a sweep to a bucket": (no_damage, ("sweep", "--table=2", "--out=Gs://b"), 2, "object stores"),
    "a sweep to nowhere": (
        no_damage,
        ("sweep", "--table=2", "--out="),
        2,
        "--out=: names no folder",
    ),
    "a plan of no slice": (no_damage, ("plan", "--topology=v9:1x1"), 2, "v9:1x1"),
    "a step that no run has": (
        no_damage,
        (*TRAIN, "--replay_step=3"),
        2,
        "--replay_step=3: the run has 2 steps",
    ),
    "a plan of no name": (no_damage, ("plan", "--topology="), 2, "--topology=: names nothing; is"),
    "a plan of two variants": (
        no_damage,
        ("plan", "--config=configs/moe_2b.py:linear", "--compare=baseline"),
        2,
        "--compare: names the variants of configs/moe_2b.py; leave out :linear",
    ),
    "analyze of a run and nothing": (
        no_damage,
        ("analyze", "--workdir={run},"),
        2,
        "run,: names nothing",
    ),
    "analyze of a step that is not kept": (
        no_damage,
        ("analyze", "--workdir={run}", "--step=9"),
        2,
        "step 9 is not kept; it has [",
    ),
    "watching a bare checkpoint": (
        no_damage,
        ("analyze", "--workdir={run}/checkpoints/00000002", "--watch=1"),
        2,
        "is a bare checkpoint, to which nothing is added",
    ),
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
INPUTS |= {name: (no_damage, *row) for name, row in PREPARED.items()}
