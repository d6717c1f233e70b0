"""The commands of `deepseekmoe analyze`: each loads a model and held-out texts, and shows one table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli import Flat, make_app
from octavo.console import Outcome
from octavo.runtime import Runtime

from deepseekmoe.config import CorpusConfig, EvaluateConfig

if TYPE_CHECKING:
    from deepseekmoe.analyze import Trace

analyze = make_app("analyze", "The paper's analyses of a trained model on held-out texts.")
analyze.version_flags = ()


@analyze.command(name="disable-top")
def disable_top(
    model: str,
    corpus: Flat[CorpusConfig],
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Loss when each token's most probable experts are masked (figure 4).

    Args:
        model: Folder or hub id.
    """
    from deepseekmoe.analyze import disable_top as analyse

    return _analysed(analyse, "Without the best experts", model, corpus, config, runtime)


@analyze.command(name="swap-shared")
def swap_shared(
    model: str,
    corpus: Flat[CorpusConfig],
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Loss when routed experts stand in for the shared ones (section 4.5).

    Args:
        model: Folder or hub id.
    """
    from deepseekmoe.analyze import swap_shared as analyse

    return _analysed(analyse, "The shared experts swapped", model, corpus, config, runtime)


@analyze.command
def active(
    model: str,
    corpus: Flat[CorpusConfig],
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Loss with fewer routed experts a token than were trained (figure 5).

    Args:
        model: Folder or hub id.
    """
    from deepseekmoe.analyze import sweep_active

    return _analysed(sweep_active, "Fewer routed experts a token", model, corpus, config, runtime)


@analyze.command(name="specialization")
def specialise(
    model: str | None = None,
    corpus: Flat[CorpusConfig | None] = None,
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    *,
    trace: Path | None = None,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """How unlike the domains' expert loads are: a .txt file of the folder is a domain.

    Args:
        model: Folder or hub id.
        trace: File of `deepseekmoe trace`, instead of a model and texts.
    """
    from deepseekmoe.analyze import specialization

    found = _traced(model, corpus, config, runtime, trace)
    rows: Any = specialization(found)
    return Outcome({"Divergence between domains": rows})


@analyze.command
def coactivation(
    model: str | None = None,
    corpus: Flat[CorpusConfig | None] = None,
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    *,
    trace: Path | None = None,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Which experts a token chooses together more often than by chance.

    Args:
        model: Folder or hub id.
        trace: File of `deepseekmoe trace`, instead of a model and texts.
    """
    from deepseekmoe.analyze import coactivation as pairs_of

    rows: Any = pairs_of(_traced(model, corpus, config, runtime, trace))
    return Outcome({"Experts chosen together": rows})


@analyze.command
def vocabulary(
    model: str,
    corpus: Flat[CorpusConfig | None] = None,
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    *,
    trace: Path | None = None,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Which tokens each expert takes the largest share of.

    Args:
        model: Folder or hub id; its tokenizer tells the tokens of a trace.
        trace: File of `deepseekmoe trace --words`, instead of texts.
    """
    from octavo.models import load_tokenizer

    from deepseekmoe.analyze import vocabulary_specialization

    found = _traced(model, corpus, config, runtime, trace, words=True)
    tokenizer = load_tokenizer(model)
    rows: Any = vocabulary_specialization(found, lambda number: tokenizer.decode([number]))
    return Outcome({"Tokens of each expert": rows})


@analyze.command
def saturation(
    model: str,
    earlier: str,
    corpus: Flat[CorpusConfig],
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Which share of its final experts a token had chosen at an earlier checkpoint already.

    Args:
        model: Folder or hub id of the later model.
        earlier: Folder or hub id of an earlier model of the same training; `train --keep-every`
            keeps them.
    """
    from deepseekmoe.analyze import saturation as compared
    from deepseekmoe.hub import load

    def analyse(loaded: Any, *given: Any, **options: Any) -> Any:
        before, _ = load(earlier, tokenizer=False)
        return compared(before.to(loaded.device, loaded.dtype), loaded, *given, **options)  # pyright: ignore

    return _analysed(analyse, "Router saturation", model, corpus, config, runtime)


def alone() -> None:
    """Refuse to be one of several processes."""
    from octavo.errors import ConfigError
    from octavo.runtime import world_size

    if world_size() > 1:
        raise ConfigError("only `train` and `sft` run under torchrun; start this command alone")


def model_and_tokens(
    model: str, corpus: CorpusConfig, config: EvaluateConfig, runtime: Runtime
) -> tuple[Any, Any, int]:
    """A model on its device, the held-out part of texts in its tokens, and a window's length."""
    import tempfile

    from octavo.errors import ConfigError

    from deepseekmoe.corpus import documents, tokenize
    from deepseekmoe.hub import load

    alone()
    if config.batch_size < 1:
        raise ConfigError(f"--batch-size {config.batch_size}: must be 1 or more")
    loaded, tokenizer = load(model)
    loaded.to(runtime.torch_device(), runtime.torch_dtype())  # pyright: ignore
    length = config.length or min(512, loaded.config.max_position_embeddings)
    part = "dev" if corpus.dev_share else "train"
    with tempfile.TemporaryDirectory() as place:
        tokens = tokenize(documents(corpus, part), tokenizer, Path(place) / "tokens")  # pyright: ignore
        return loaded, replace(tokens, values=tokens.values[:].copy()), length


def what_was_read(corpus: CorpusConfig, tokens: Any) -> str:
    """How much of the texts `model_and_tokens` gave."""
    share = f"the {100 * corpus.dev_share:g} % that --dev-share holds out (0 reads everything)"
    return f"Read: {len(tokens):,} tokens of {corpus.data}, {share if corpus.dev_share else 'all of it'}"


def _analysed(
    analyse: Any, title: str, model: str, corpus: CorpusConfig, config: EvaluateConfig,
    runtime: Runtime,
) -> Outcome:  # fmt: skip
    """Run an analysis that takes a model, tokens and a window's length."""
    runtime.start()
    loaded, tokens, length = model_and_tokens(model, corpus, config, runtime)
    rows = analyse(loaded, tokens, length, batch_size=config.batch_size)
    return Outcome({title: rows}, note=what_was_read(corpus, tokens))


def _traced(
    model: str | None, corpus: CorpusConfig | None, config: EvaluateConfig, runtime: Runtime,
    file: Path | None, words: bool = False,
) -> "Trace":  # fmt: skip
    """A trace from its file, or recorded now."""
    from octavo.errors import ConfigError

    from deepseekmoe.analyze import Trace, trace_routing

    alone()
    runtime.start()
    if file is not None:
        if corpus is not None or (model and not words):
            raise ConfigError(f"--trace {file} tells what a model did on texts: name no others")
        return Trace.load(file)
    if model is None or corpus is None:
        raise ConfigError("there is nothing to look at: give MODEL and --data, or --trace FILE")
    loaded, tokens, length = model_and_tokens(model, corpus, config, runtime)
    return trace_routing(loaded, tokens, length, config.batch_size, words)
