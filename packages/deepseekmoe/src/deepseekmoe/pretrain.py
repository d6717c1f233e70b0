"""Pre-train a model on texts: tokenizer, packed windows, training, evaluation, one folder."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError, DataError, ModelError
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
from deepseekmoe.evaluate import filling
from deepseekmoe.hub import load, load_moe_config, register
from deepseekmoe.optimize import check_options, optimize
from deepseekmoe.parallel import (
    check_processes,
    main_first,
    processes,
    spread,
    whole_model,
    without_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseekmoe.modeling import DeepseekMoeForCausalLM


log = logging.getLogger(__name__)

#: What older releases of the library wrote into every configuration, and what it reads itself.
OLD_KEYS = {"torch_dtype", "rope_theta", "rope_scaling", "ep_size", "use_cache", "num_experts"}


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


def make_config(
    choice: ModelConfig | DeepseekMoeConfig, tokenizer: Any, length: int
) -> DeepseekMoeConfig:
    """The configuration that the options mean.

    Args:
        choice: a preset and what differs from it, or a whole configuration.
        tokenizer: gives the vocabulary and the special tokens.
        length: tokens of a sequence, which the model is made for at the least.

    Raises:
        ConfigError: there is no such preset or baseline, two options contradict each other, or a
            number does not fit.
        ModelError: the file of keys cannot be read, or is of another family.
    """
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = (
        choice.changed(**words) if isinstance(choice, DeepseekMoeConfig) else _chosen(choice, words)
    )
    if config.max_position_embeddings < length:
        config.max_position_embeddings = length
    return config


def _chosen(choice: ModelConfig, words: dict[str, Any]) -> DeepseekMoeConfig:
    """Preset, then the file's keys, then options; at last the baseline."""
    from deepseekmoe.experts import check_backend

    _refuse_contradictions(choice)
    check_backend(choice.backend)
    changes: dict[str, Any] = {
        "num_hidden_layers": choice.layers,
        "n_shared_experts": choice.shared_experts,
        "n_routed_experts": choice.routed_experts,
        "num_experts_per_tok": choice.active_experts,
        "aux_loss_alpha": _alpha(choice, choice.aux_alpha),
        "device_loss_alpha": _alpha(choice, choice.device_alpha),
        "n_devices": choice.devices,
        "bias_update_rate": {"bias": choice.bias_rate, "loss": None, "none": 0.0}[choice.balance],
        "experts_backend": None if choice.backend == "auto" else choice.backend,
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
    keys = read_keys(choice.model_config) if choice.model_config else {}
    over_devices = {
        name: changes.pop(name) for name in ("n_devices", "device_loss_alpha") if name in changes
    }  # of the experts that there are in the end
    config = DeepseekMoeConfig.preset(choice.preset, **(keys | changes | words))
    if choice.granularity is not None:
        config.check_standard()
        narrow = round(config.intermediate_size / choice.granularity)
        config = config.changed(moe_intermediate_size=narrow)
    if choice.baseline != "deepseekmoe":
        config = config.baseline(choice.baseline)
    if over_devices:
        config = config.changed(**over_devices)
    if config.device_loss_alpha and config.n_devices == 1:
        raise ConfigError(
            "--device-alpha on 1 device balances nothing: say with --devices how many there are"
        )
    return config


def _refuse_contradictions(choice: ModelConfig) -> None:
    """Stop where one option would undo another.

    Raises:
        ConfigError: one would.
    """
    numbers = {
        "--routed-experts": choice.routed_experts,
        "--shared-experts": choice.shared_experts,
        "--active-experts": choice.active_experts,
        "--granularity": choice.granularity,
    }
    given = [name for name, value in numbers.items() if value is not None]
    if choice.baseline != "deepseekmoe" and given:
        raise ConfigError(
            f"--baseline {choice.baseline} and {given[0]}: a baseline has experts of its own; leave "
            "one of them out"
        )
    if choice.balance != "loss" and choice.aux_alpha:
        raise ConfigError(
            f"--balance {choice.balance} and --aux-alpha {choice.aux_alpha:g}: the balance loss is off; "
            "leave one of them out"
        )
    if choice.balance != "bias" and choice.bias_rate != ModelConfig().bias_rate:
        raise ConfigError("--bias-rate is of --balance bias: add that, or leave it out")
    if choice.granularity is not None and choice.routed_experts is not None:
        raise ConfigError(
            "--granularity and --routed-experts: the granularity m gives 16m experts; leave one out"
        )


def _alpha(choice: ModelConfig, given: float | None) -> float | None:
    """A loss's alpha: what is given, else none without --balance loss, else the preset's."""
    return 0.0 if given is None and choice.balance != "loss" else given


def read_keys(path: Path) -> dict[str, Any]:
    """Keys of a configuration from a JSON file; those that no model knows are told of.

    Raises:
        ModelError: it is no such file, or of another family.
    """
    try:
        keys = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no JSON that can be read ({error})") from None
    if not isinstance(keys, dict):
        raise ModelError(f"{path}: must hold an object of keys, such as a config.json")
    if keys.pop("model_type", "deepseek") != "deepseek":
        raise ModelError(f"{path}: is of another family; its model_type must be deepseek")
    for name in ("architectures", "auto_map", "transformers_version"):
        keys.pop(name, None)
    strange = sorted(set(keys) - set(DeepseekMoeConfig().to_dict()) - OLD_KEYS)
    if strange:
        log.warning("%s: no model reads %s; look for misspellings", path, ", ".join(strange))
    return keys


def make_model(config: DeepseekMoeConfig, runtime: Runtime) -> "DeepseekMoeForCausalLM":
    """A model with random weights, on the CPU; on processes other than rank 0 without weights."""
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    register()
    seed_everything(runtime.seed)
    return DeepseekMoeForCausalLM(config) if is_main() else without_weights(config)


def pretrain(
    choice: ModelConfig | DeepseekMoeConfig,
    corpus: CorpusConfig,
    config: PretrainConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> Trained:
    """Train a language model from scratch and save it in the run's folder `model`.

    With `keep_every` what it was after so many updates is kept beside it, in `model-STEP`.
    Under torchrun the processes share the work as `config` says; enter `parallel.processes` before to
    go on together with what this gives.

    Args:
        choice: the model: a preset and what differs from it, or a whole configuration.
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
        if config.keep_every < 0:
            raise ConfigError(f"--keep-every {config.keep_every}: must be 0 or more")
        tokenizer, train, dev = open_corpus(corpus, config, run)
        shape = make_config(choice, tokenizer, config.length)
        check_processes(config, shape.n_routed_experts)
        Windows(train, config.length)
        if dev is not None:
            _check_held_out(dev, config.length)
        return tokenizer, train, dev, shape

    def keep(step: int, model: Any) -> None:
        if config.keep_every and step % config.keep_every == 0 and step < config.steps:
            save_model(run.path / f"model-{step}", whole_model(model), tokenizer)

    with processes(runtime):
        tokenizer, train, dev, shape = main_first(prepare)
        if (run.path / "model").is_dir():  # a kill came behind the training
            model = _load_divided(run.path / "model", config, runtime)
        else:
            model = train_model(shape, train, config, run, runtime, keep)
            model.config.use_cache = True
            save_model(run.path / "model", whole_model(model), tokenizer)
        discard_checkpoints(run)
    return Trained(model, tokenizer, dev)


def _load_divided(folder: Path, config: PretrainConfig, runtime: Runtime) -> Any:
    """A saved model on the processes that share it, as a training leaves it."""
    if is_main():
        model, _ = load(folder, tokenizer=False)
    else:
        model = without_weights(load_moe_config(folder))
    spread(model, config, runtime.torch_device(), runtime.torch_dtype())
    return model.eval()


def _check_held_out(dev: Tokens, length: int) -> None:
    """Refuse, before any training, held-out text that could not be evaluated behind it."""
    try:
        filling(dev, length)
    except DataError as error:
        raise DataError(
            f"held-out text: {error}, a larger --dev-share, or --dev-share 0 to hold none out"
        ) from None


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
    each_step: Callable[[int, Any], None] | None = None,
) -> "DeepseekMoeForCausalLM":
    """Train a model of this configuration on tokens.

    Args:
        shape: of the model.
        train: the tokens.
        config: the training.
        run: for metrics and checkpoints.
        runtime: seed of the weights and of the order of windows, device, precision.
        each_step: see `optimize`.
    """
    windows = Windows(train, config.length)
    model = make_model(shape, runtime)
    batches = shuffled_batches(windows.rows, len(windows), config, runtime.seed)
    return optimize(model, batches, config, run, runtime, each_step=each_step)


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
