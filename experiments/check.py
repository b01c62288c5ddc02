"""Checks what every way for heads to interact has to keep.

    python -m experiments.check
    python -m experiments.check --only=mlp,linear --add=mine.py:variant

Every projection and every mechanism of configs/base.py, and what --add names, is held to the
properties of kha_jax/comparing/properties.py, a line each. Exit code 1 names what fails.
"""

import os
import time

import jax
from absl import flags

from experiments.cli import codes, command_line
from experiments.sweeps import members
from experiments.sweeps.members import Member
from kha_jax.comparing.properties import check
from kha_jax.training.run_config import RunConfig

command_line.define_config()
ADD = flags.DEFINE_list("add", [], "Also FILE.py:VARIANT, configs of your own, by commas.")
ONLY = flags.DEFINE_list("only", [], "Of all variants, these, the baseline and --add.")

BROKEN = 1  # exit code of a check that failed


def quickly_on_cpus() -> None:
    """Eight virtual devices, whose products are float32, and code that is not optimised, which
    compiles in a third of the time. jax reads this when it first computes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()


def check_all(found: dict[str, Member]) -> int:
    """A line for each variant, and the exit code."""
    failed = []
    for name, member in found.items():
        began = time.perf_counter()
        kept = check(member.run.model)
        broken = [f"{prop}: {of.text}" for prop, of in kept.items() if of.holds is False]
        figures = [f"{prop} {of.figure:.1g}" for prop, of in kept.items() if of.holds]
        words = f"FAILED {'; '.join(broken)}" if broken else f"ok {', '.join(figures)}"
        failed += [name] if broken else []
        print(f"{name:16} {words} ({time.perf_counter() - began:.1f} s)", flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else "all keep what they have to")
    return BROKEN if failed else codes.DONE


def main() -> int:
    """See the module's docstring."""
    command_line.refuse_empty(ADD, ONLY)
    config: RunConfig = command_line.parse_config(RunConfig)
    found = members.members(config, ADD.value, ONLY.value)
    quickly_on_cpus()
    return check_all(found)


if __name__ == "__main__":
    command_line.run(main)
