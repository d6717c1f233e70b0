"""Pre-train a model on texts: tokenizer, packed windows, training, evaluation, one folder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError
from octavo.models import load_tokenizer, save_model
from octavo.rundir import RunDir, atomic
from octavo.runtime import Runtime, is_main, seed_everything

from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.checkpoints import discard_checkpoints
from deepseekmoe.config import CorpusConfig, ModelConfig, PretrainConfig
from deepseekmoe.corpus import (
    Tokens,
    Windows,
    documents,
    shuffled_batches,
    tokenize,
    train_tokenizer,
)
from deepseekmoe.hub import register
from deepseekmoe.optimize import check_options, optimize
from deepseekmoe.parallel import (
    check_processes,
    main_first,
    processes,
    whole_model,
    without_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseekmoe.modeling import DeepseekMoeForCausalLM


@dataclass(frozen=True)
class Trained:
    """A model that was pre-trained, and the held-out tokens it was not.

    Attributes:
        model: in evaluation mode; where processes share it they call it together.
        tokenizer: its tokenizer.
        dev: held-out tokens; None where nothing was held out.
    """

    model: "DeepseekMoeForCausalLM"
    tokenizer: "PreTrainedTokenizerBase"
    dev: Tokens | None


def make_config(choice: ModelConfig, tokenizer: Any, length: int) -> DeepseekMoeConfig:
    """The configuration that the options mean.

    Args:
        choice: a preset and what differs from it.
        tokenizer: gives the vocabulary and the special tokens.
        length: tokens of a sequence, which the model is made for at the least.

    Raises:
        ConfigError: there is no such preset or baseline, or a number does not fit.
    """
    changes: dict[str, Any] = {
        "num_hidden_layers": choice.layers,
        "n_shared_experts": choice.shared_experts,
        "n_routed_experts": choice.routed_experts,
        "num_experts_per_tok": choice.active_experts,
        "aux_loss_alpha": _alpha(choice, choice.aux_alpha),
        "device_loss_alpha": _alpha(choice, choice.device_alpha),
        "n_devices": choice.devices,
        "bias_update_rate": choice.bias_rate if choice.balance == "bias" else None,
        "experts_backend": choice.backend,
    }
    if choice.granularity is not None:
        pieces, shared = choice.granularity, choice.shared_experts or 0
        if pieces < 1 or not 0 <= shared < 2 * pieces:
            raise ConfigError(
                f"--granularity {pieces} with {shared} shared experts: 1 or more, and fewer shared "
                "experts than twice as many"
            )
        changes |= {
            "n_shared_experts": shared,
            "n_routed_experts": 16 * pieces - shared,
            "num_experts_per_tok": choice.active_experts or 2 * pieces - shared,
        }
    if choice.width is not None:
        standard = 2 * choice.width if choice.preset == "tiny" else round(8 * choice.width / 3)
        heads = max(1, choice.width // (16 if choice.preset == "tiny" else 128))
        changes |= {
            "hidden_size": choice.width, "intermediate_size": standard,
            "moe_intermediate_size": standard // 4, "num_attention_heads": heads,
        }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = DeepseekMoeConfig.preset(choice.preset, **changes)
    if choice.granularity is not None:
        config.check_standard()
        config.moe_intermediate_size = round(config.intermediate_size / choice.granularity)
    if choice.baseline != "deepseekmoe":
        config = config.baseline(choice.baseline)
    if config.max_position_embeddings < length:
        config.max_position_embeddings = length
    return config


def _alpha(choice: ModelConfig, given: float | None) -> float | None:
    """A loss's alpha: what is given, else none without --balance loss, else the preset's."""
    return 0.0 if given is None and choice.balance != "loss" else given


def make_model(config: DeepseekMoeConfig, runtime: Runtime) -> "DeepseekMoeForCausalLM":
    """A model with random weights, on the CPU; on processes other than rank 0 without weights."""
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    register()
    seed_everything(runtime.seed)
    return DeepseekMoeForCausalLM(config) if is_main() else without_weights(config)


def pretrain(
    choice: ModelConfig,
    corpus: CorpusConfig,
    config: PretrainConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> Trained:
    """Train a language model from scratch and save it in the run's folder `model`.

    Under torchrun the processes share the work as `config` says; enter `parallel.processes` before to
    go on together with what this gives.

    Args:
        choice: the model.
        corpus: the texts.
        config: the training.
        run: the folder; what was done there before a kill is not done again.
        runtime: seed, device, precision.

    Raises:
        ConfigError: an option is out of range or does not fit the others.
        DataError: there is no such text, or too little of it.
        ModelError: the tokenizer cannot be had, or the training diverged.
    """

    def prepare() -> tuple[Any, Tokens, Tokens | None, DeepseekMoeConfig]:
        check_options(config)
        tokenizer, train, dev = open_corpus(corpus, config, run)
        shape = make_config(choice, tokenizer, config.length)
        check_processes(config, shape.n_routed_experts)
        Windows(train, config.length)
        return tokenizer, train, dev, shape

    with processes(runtime):
        tokenizer, train, dev, shape = main_first(prepare)
        model = train_model(shape, train, config, run, runtime)
        model.config.use_cache = True
        save_model(run.path / "model", whole_model(model), tokenizer)
        discard_checkpoints(run)
    return Trained(model, tokenizer, dev)


def open_corpus(
    corpus: CorpusConfig, config: PretrainConfig, run: RunDir
) -> tuple["PreTrainedTokenizerBase", Tokens, Tokens | None]:
    """The tokenizer, loaded or trained, and the tokens of training and held-out texts.

    Raises:
        DataError: there is no such text.
        ModelError: the tokenizer cannot be had.
    """
    tokenizer = _tokenizer(corpus, config, run)
    train = _tokens("train", corpus, tokenizer, run)
    dev = _tokens("dev", corpus, tokenizer, run) if corpus.dev_share else None
    return tokenizer, train, dev


def train_model(
    shape: DeepseekMoeConfig,
    train: Tokens,
    config: PretrainConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> "DeepseekMoeForCausalLM":
    """Train a model of this configuration on tokens.

    Args:
        shape: of the model.
        train: the tokens.
        config: the training.
        run: for metrics and checkpoints.
        runtime: seed of the weights and of the order of windows, device, precision.
    """
    windows = Windows(train, config.length)
    model = make_model(shape, runtime)
    batches = shuffled_batches(windows.rows, len(windows), config, runtime.seed)
    return optimize(model, batches, config, run, runtime)


def _tokenizer(
    corpus: CorpusConfig, config: PretrainConfig, run: RunDir
) -> "PreTrainedTokenizerBase":
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    folder = run.path / "tokenizer"
    if not folder.is_dir():
        tokenizer = train_tokenizer(documents(corpus, "train"), config.vocabulary)
        with atomic(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    return load_tokenizer(folder)


def _tokens(part: Any, corpus: CorpusConfig, tokenizer: Any, run: RunDir) -> Tokens:
    return tokenize(documents(corpus, part), tokenizer, run.path / f"tokens-{part}")
