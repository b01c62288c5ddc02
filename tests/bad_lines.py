"""Command lines and config files that cannot work, and what is said of each."""

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
    "--config.model.attention.value.kind=": "value.kind: '' is not known; use one of none, linear",
    "--config.data.source=": "config.data.source: '' is not known; use one of",
    f"{HEADS}.rope_scaling.kind=llama3 {HEADS}.rope_scaling.low_freq_factor=-3": "low_freq_factor: "
    "must be at least 0, found -3",
    "--tensorboard=2": "--tensorboard=2: Non-boolean argument to boolean flag",
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
    "--num_processes=2 --process_id=0 --coordinator_address=": "must be HOST:PORT",
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

# ---------------------------------------------------------------- prepare_data
# line: the command, its exit code, what it says
PREPARE = ("prepare_data", "--input={here}/text", "--out={here}/shards")
PREPARED = {
    " ".join((*command, *flags)): ((*command, *flags), code, said)
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
