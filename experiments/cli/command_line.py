"""What all commands share: the config flag, one-line errors, exit codes, logging."""

import contextlib
import difflib
import faulthandler
import inspect
import logging
import os
import re
import sys
import threading
from typing import Any, Callable, Mapping, Sequence

from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from experiments.cli import c_library, help_text, hints
from experiments.cli.codes import (
    DONE,
    HANG,
    UsageError,
    code_of,
    one_line,
)
from experiments.cli.config_files import (
    REPOSITORY,
    check_config_file,
    check_override,
    functions_of,
    run_config_file,
)
from experiments.cli.terminal import Log, Terminal, spare
from kha_jax.config import ConfigError, from_dict, near

GRACE = 10.0  # seconds in which a process that hangs says so
DEFAULT_CONFIG = str(REPOSITORY / "configs" / "kha_tiny.py")


def define_config(default: str = DEFAULT_CONFIG, of_run: bool = False) -> None:
    """The flag --config=file.py[:variant], with --config.a.b=value for single fields; complaints
    end the program at once. of_run: the default is the config of the run that --workdir names,
    where there is one.

    config_flags already reads the command line when the flag is defined, so the overrides are
    checked here.
    """
    arguments = [a for a in sys.argv if not re.match(r"--?(no)?config\.help(=|$)", a)]
    try:
        if help_text.wanted():
            arguments = arguments[:1]
        default = of_run and _config_of_run(arguments[1:]) or default
        _check_config_arguments(arguments[1:], default)
        _define_flag(arguments, default, flags.FLAGS)
        flags.DEFINE_bool("config.help", False, "List the config's fields with their meaning.")
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
        print(f"error: {one_line(error)}", file=Terminal(sys.stderr))
        sys.exit(code)


class _ConfigFiles(flags.ArgumentParser):
    """Configs of files that `run_config_file` runs."""

    def parse(self, path: str) -> ConfigDict:
        """The config, without fields to add."""
        file, _, variant = path.partition(":")
        return run_config_file(file, variant).lock()


def _define_flag(arguments: list[str], default: str, values: flags.FlagValues) -> None:
    about = "Run config, FILE.py or FILE.py:VARIANT; --config.FIELD=VALUE sets a field of it."
    config_flags.DEFINE_config_file("config", None, about, flag_values=values, sys_argv=arguments)
    values["config"].parser = _ConfigFiles()  # before the default is read
    values.set_default("config", default)


def _config_of_run(arguments: list[str]) -> str | None:
    """The config.json of the run that --workdir names, where there is one."""
    named = _values_of("workdir", arguments)
    path = os.path.join(os.path.expanduser(named[-1]), "config.json") if named else ""
    return path if os.path.isfile(path) and ":" not in path else None  # which names a variant


def _check_config_arguments(arguments: list[str], default: str) -> None:
    """Raises UsageError when the config file does not load or an override names no field or has the
    wrong type."""
    path, colon, variant = _named_config(arguments, default).partition(":")
    if not path.strip():
        raise UsageError("--config: names no file; write --config=FILE.py or --config=FILE.py:NAME")
    if colon and not variant.strip():
        raise UsageError(f"--config={path}:{variant}: names no variant; write --config={path}")
    check_config_file(path)
    sys.path.insert(0, str(REPOSITORY))  # config files share pieces through the package configs
    config = run_config_file(path, variant)
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]*)(?:=(.*))?$", argument, re.DOTALL)
        if match:
            check_override(config, match[1], match[2])


def _named_config(arguments: list[str], default: str) -> str:
    """What --config=FILE, or --config FILE, names.

    Raises:
        UsageError: there are two of them.
    """
    named = _values_of("config", arguments)
    if len(named) > 1:
        raise UsageError(f"--config={named[1]}: there is --config={named[0]} too; leave out one")
    return named[0] if named else default


def _values_of(flag: str, arguments: list[str]) -> list[str]:
    """What --FLAG=VALUE, or --FLAG VALUE, gives, as often as it stands there."""
    return [
        following if match[1] is None else match[1]
        for argument, following in zip(arguments, [*arguments[1:], ""])
        if (match := re.fullmatch(rf"--?{flag}(?:=(.*))?", argument, re.DOTALL))
    ]


def config_of(cls: type, arguments: Sequence[str]) -> Any:
    """The frozen config that a command with these arguments has: --config=FILE.py[:VARIANT] and
    --config.FIELD=VALUE.

    Raises:
        UsageError: names the field, what was found and what would work.
    """
    _check_config_arguments(list(arguments), DEFAULT_CONFIG)
    values, line = flags.FlagValues(), ["", *arguments]
    _define_flag(line, DEFAULT_CONFIG, values)
    try:
        values(line)
        return parsed(cls, values["config"])
    except (flags.Error, ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from None


def parse_config(cls: type) -> Any:
    """The frozen config of type `cls` from the parsed flag; --config.help lists it and ends the
    program.

    Raises:
        UsageError: names the field, what was found and what would work.
    """
    try:
        config = parsed(cls, flags.FLAGS["config"])
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if flags.FLAGS["config.help"].value:
        print("\n".join(help_text.of_fields(config, "config")))
        print("To see the fields of another kind, name it beside --config.help.")
        sys.exit(DONE)
    return config


def parsed(cls: type, flag: Any) -> Any:
    """The frozen config of a flag that has been read. Where the config file has PRESETS, those of
    `mesh.preset` set their fields, but for what was typed."""
    typed = config_flags.get_override_values(flag)
    if "mesh.preset" in typed:
        presets = functions_of(flag.config_filename.partition(":")[0]).get("PRESETS", {})
        meant = presets.get(flag.value.mesh.preset, {})
        flag.value.update_from_flattened_dict({k: v for k, v in meant.items() if k not in typed})
    return from_dict(cls, flag.value, typed={f"config.{path}" for path in typed})


def load_variant(cls: type, path: str, variant: str, flag: str = "--config") -> Any:
    """The frozen config of a variant of a config file, which `flag` has named.

    Raises:
        UsageError: there is no such file, or it does not know the variant.
    """
    check_config_file(path, flag)
    try:
        return from_dict(cls, run_config_file(path, variant, flag))
    except ConfigError as error:
        raise UsageError(f"{path}:{variant}: {error}") from None


def _parse_flags(argv: list[str], words: int) -> list[str]:
    """absl's parser, with every complaint turned into one line; returns the words that are no
    flags, `words` of them at most."""
    if any(re.match(r"--?(flagfile|undefok)\b", argument) for argument in argv):
        raise UsageError("--flagfile and --undefok: are not read; write the flags out")
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        hint = _meant_flag(error.flagname, argv)
        raise UsageError(f"--{error.flagname} is not a known flag; {hint}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        said = re.sub(r"\('([^']*)', .*\)$", r"\1", " ".join(str(error).split()))  # of booleans
        raise UsageError(said) from None
    if len(rest) > words + 1:
        raise UsageError(f"{rest[words + 1]!r} is not understood; flags have the form --name=value")
    return rest[1:]


def _meant_flag(name: str, argv: list[str]) -> str:
    """A hint for a flag that is not known: a field of the config is called so, or a flag nearly."""
    known = [flag.name for flag in own_flags()]
    if "config" in known and not difflib.get_close_matches(name, known, cutoff=0.8):
        path, _, variant = _named_config(argv[1:], DEFAULT_CONFIG).partition(":")
        if meant := hints.nested(run_config_file(path, variant), name):
            return f"did you mean --{meant.replace(' or ', ' or --')}?"
    return near(name, known)


def refuse_empty(*given: flags.FlagHolder) -> None:
    """Raises UsageError where a flag was typed and names nothing, or nothing at one of its
    commas."""
    for flag in given:
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        if flags.FLAGS[flag.name].present and not (values and all(values)):
            typed = ",".join(values)
            problem = "names nothing; is a variable of the shell not set?"
            raise UsageError(f"--{flag.name}={typed}: {problem}")


def give_up(message: str, code: int = HANG, stacks: bool = False) -> None:
    """Ends the process at once: leaving in order would wait once more for what did not come.

    stacks: of all threads first.
    """
    unseen = threading.Timer(GRACE, os._exit, [code])  # the terminal may be what hangs
    unseen.daemon = True
    unseen.start()
    if stacks:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.stderr)
    print(f"{Log.prefix}error: {one_line(message)}", file=sys.stderr, flush=True)
    os._exit(code)


def own_flags(of: Sequence[str] | None = None) -> list[flags.Flag]:
    """The flags of this program, without those that absl has for all; `of`: these alone."""
    modules = (__name__, sys.argv[0])
    own = [flag for module in modules for flag in flags.FLAGS.get_flags_for_module(module)]
    return [flag for flag in own if of is None or flag.name in of]


def _quiet_libtpu() -> None:
    """jax tries every platform that is installed. Where it found no TPU when it was imported,
    libtpu would complain that nothing names its slice, and any name will do. A command that has not
    imported jax by now does without the seconds that this takes."""
    if os.environ.get(c_library.NO_TPU) == "1" and not c_library.TOLD_OF_NO_TPU:
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _report(lost: Any) -> None:
    """Shows an error that cannot be raised, but not those of threads which still write a save that
    has failed: the storage library has left their loop by then."""
    if (lost.exc_type, str(lost.exc_value)) != (RuntimeError, "Event loop is closed"):
        sys.__unraisablehook__(lost)


def run(
    main: Callable[..., int | None], words: int = 0, commands: Mapping[str, Any] | None = None
) -> None:
    """Parses the flags, calls main and leaves with the contract's exit code; expected errors are
    one line on stderr.

    words: how many arguments that are not flags main takes, at most. commands: those that the first
    of them may name, for --help.
    """
    from kha_jax.errors import SilentError, WaitError

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no text ends a program
    sys.stdout, sys.stderr = Terminal(sys.stdout, needed=True), Terminal(sys.stderr)
    log = logging.getLogger("kha_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(Log())
    # pages of tracebacks for a save that failed, of which our one line tells
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    sys.unraisablehook = _report
    try:
        code = _outcome(main, words, commands or {})
        sys.stdout.flush()
    except Exception as error:
        code = code_of(error)
        if isinstance(error, (WaitError, SilentError)):
            give_up(str(error), code)
        # which is there where there are several: jax takes a second that others do not wait for
        processes = sys.modules.get("kha_jax.runs.processes")
        if processes and processes.lost_peer(error):
            give_up(
                "another process of the run is gone; start all of them again and they go on from "
                f"the newest checkpoint ({error})"
            )
        if code is None:
            raise
        spare()  # what is still to be written of it
        print(f"{Log.prefix}error: {one_line(error)}", file=sys.stderr)
    sys.exit(code)


def _outcome(main: Callable[..., int | None], words: int, commands: Mapping[str, Any]) -> int:
    """The exit code of what the command line asks for."""
    if help_text.wanted():
        about, own = sys.modules["__main__"].__doc__, None
        if named := next((word for word in sys.argv[1:] if word in commands), None):
            about, own = inspect.getdoc(commands[named].main), commands[named].flags
        print("\n".join(help_text.of_program(about, own_flags(own), REPOSITORY)))
        return DONE
    _quiet_libtpu()
    try:
        return main(*_parse_flags(sys.argv, words)) or DONE
    except SystemExit as left:
        return left.code or DONE
