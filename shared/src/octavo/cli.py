"""The command line that every package has: one app, one error boundary, one set of common options.

    app = make_app("cascadebert", "Classification several times faster.")

    @app.command
    def train(options: Flat[TrainOptions], runtime: Flat[Runtime] = Runtime()) -> Outcome: ...

    main = partial(run, app)

A command takes configuration dataclasses, flattened into options, and returns an `Outcome`.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Dict

from octavo import console
from octavo.console import Outcome
from octavo.errors import ConfigError, OctavoError

T = TypeVar("T")

#: A dataclass argument whose fields are options of their own: `--learning-rate`, not
#: `--options.learning-rate`.
Flat = Annotated[T, Parameter(name="*")]


def _seeds(type_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(seed) for token in tokens for seed in token.value.split(","))


#: Seeds to repeat a run with, written `--seeds 0,1,2`.
Seeds = Annotated[tuple[int, ...], Parameter(converter=_seeds)]


def make_app(package: str, help: str) -> App:
    """An app named like its package, with the common options of every command.

    Args:
        package: the distribution's name, which is the command's too.
        help: one or two lines of what the package does.
    """
    app = App(
        name=package,
        help=help,
        version=lambda: f"{package} {version(package)}",
        help_format="plaintext",
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,  # `run` says what can be done then
    )
    app.meta.suppress_keyboard_interrupt = False
    app.meta.group_parameters = Group("Common options", sort_key=9)

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None, Parameter(help="YAML file of options; the command line wins.")
        ] = None,
        json: Annotated[bool, Parameter(help="Print the result as JSON.")] = False,
        verbose: Annotated[bool, Parameter(help="Log more, library warnings included.")] = False,
        quiet: Annotated[bool, Parameter(help="Log warnings only, show no progress.")] = False,
        log_file: Annotated[Path | None, Parameter(help="Write the log to this file too.")] = None,
    ) -> Outcome | None:
        options = {} if config is None else _options_from(config)
        json, verbose, quiet = (
            given or _switch(options, name)
            for name, given in (("json", json), ("verbose", verbose), ("quiet", quiet))
        )
        in_file = options.pop("log-file", None)
        log_file = log_file or (Path(str(in_file)) if in_file else None)
        level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
        console.start(package, level, log_file)
        _calm_libraries(verbose)
        app.config = (Dict(options, use_commands_as_keys=False, source=str(config)),)
        outcome = app(tokens)
        if isinstance(outcome, Outcome):
            console.show(outcome, as_json=json)
        return outcome

    return app


def run(app: App, arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 is done, 2 wrong input, 3 the answer is no, 130 interrupted.

    A crash is not caught: its traceback is what helps, and the interpreter exits with 1.

    Args:
        app: what `make_app` made.
        arguments: the words after the command's name; the process's own by default.
    """
    name = app.name[0]
    for order, command in enumerate(app):  # help lists them as written, which is the method's order
        if not command.startswith("-"):
            app[command].sort_key = order
    try:
        outcome = app.meta(
            sys.argv[1:] if arguments is None else arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        return _complain(name, f"{_one_line(error)} See `{name} --help`.", ConfigError.exit_code)
    except OctavoError as error:
        return _complain(name, _one_line(error), error.exit_code)
    except KeyboardInterrupt:
        words = "interrupted; a started run is resumed by the same command without --overwrite"
        return _complain(name, words, 130)
    if isinstance(outcome, Outcome) and outcome.no:
        return _complain(name, outcome.no, 3)
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _complain(name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr)  # noqa: T201
    return code


def _options_from(path: Path) -> dict[str, Any]:
    """The options of a YAML file by their names on the command line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or error
        raise ConfigError(f"--config {path}{where}: not YAML: {what}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must map option names to values, like `seed: 1`")
    for key, value in content.items():
        if isinstance(value, dict):
            raise ConfigError(f"--config {path}: {key!r} must be a value or a list, not a mapping")
    return {str(key).replace("_", "-"): value for key, value in content.items()}


def _switch(options: dict[str, Any], name: str) -> bool:
    """Take a common switch out of a file's options."""
    value = options.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"--config: {name!r} must be true or false, not {value!r}")
    return value


def _calm_libraries(verbose: bool) -> None:
    """Keep other libraries' bars, notices and warnings out of the way unless asked for."""
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
