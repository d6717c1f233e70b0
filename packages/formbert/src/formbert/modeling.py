"""The two models: a cross-encoder of text and gloss, and a bi-encoder whose glosses can be cached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from octavo.errors import ModelError
from octavo.models import load_config, load_model, load_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from formbert.config import ModelOptions
from formbert.formations import NAMES
from formbert.fusion import Fusion
from formbert.predictor import MeanPredictor, SpanPredictor, mean_state

Batch = dict[str, Tensor]


class FormBertConfig(PreTrainedConfig):
    """An encoder's own configuration, and the options of `ModelOptions`."""

    model_type = "formbert"
    encoder: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    labels: list[str] | None = None
    calibration: float = 1.0

    def __post_init__(self, **rest: Any) -> None:
        self.encoder = self.encoder or {"model_type": "bert"}
        self.options = self.options or {}
        self.labels = list(NAMES) if self.labels is None else list(self.labels)
        super().__post_init__(**rest)

    @property
    def model_options(self) -> ModelOptions:
        """What the model is."""
        options: dict[str, Any] = {**(self.options or {})}
        options["fusion"] = tuple(options.get("fusion", ()))
        return ModelOptions(**options)

    def encoder_config(self) -> PreTrainedConfig:
        """Of the encoder alone."""
        return AutoConfig.for_model(**(self.encoder or {}))


class FormBertCrossConfig(FormBertConfig):
    """Of a cross-encoder."""

    model_type = "formbert_cross"


class FormBertBiConfig(FormBertConfig):
    """Of a bi-encoder."""

    model_type = "formbert_bi"


@dataclass
class Scores:
    """What a forward pass gives.

    Attributes:
        scores: of each pair of text and sense, [pairs]; larger is better.
        logits: of a cross-encoder's pairs, wrong and right, [pairs, 2].
        formation_logits: of each text, [texts, labels]; None without a predictor.
    """

    scores: Float[Tensor, " pairs"]
    logits: Float[Tensor, "pairs 2"] | None
    formation_logits: Float[Tensor, "texts labels"] | None


class FormBert(PreTrainedModel):
    """What the two models share: the encoder, the formations' vectors, their fusion and predictor."""

    config: FormBertConfig
    config_class = FormBertConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    pools: ClassVar[bool] = True

    def __init__(self, config: FormBertConfig) -> None:
        super().__init__(config)
        self.options = options = config.model_options
        inner = config.encoder_config()
        self.encoder = AutoModel.from_config(inner)
        if not self.pools and getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        width, labels = inner.hidden_size, len(config.labels or ())
        if not labels:
            raise ModelError("--signal pos: the inventory has no parts of speech")
        self.dropout = nn.Dropout(options.dropout)
        if set(options.fusion) & {"pooled_add", "pooled_mlp", "bilinear"}:
            self.formation_embedding = nn.Embedding(labels + 1, width)
        if "token" in options.fusion:
            self.formation_token = nn.Embedding(labels + 1, self._word_width())
        self.fusion = Fusion(options.fusion, width, labels)
        self.layer = max(1, round(inner.num_hidden_layers / 3))
        if options.predictor == "mean":
            self.formation_predictor = MeanPredictor(self._word_width(), labels)
        elif options.predictor == "span":
            self.formation_predictor = SpanPredictor(width, labels, options.dropout)

    def _word_width(self) -> int:
        return self.encoder.get_input_embeddings().embedding_dim

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            deviation = getattr(self.encoder.config, "initializer_range", 0.02)
            nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Fusion):
            if "matrix" in module.names:
                nn.init.normal_(module.formation_down, std=module.formation_down.shape[-1] ** -0.5)
                nn.init.zeros_(module.formation_up)
            if "agreement" in module.names:
                nn.init.ones_(module.formation_alpha)

    def run(
        self, rows: Batch, shares: Float[Tensor, "rows labels1"] | None = None, **options: Any
    ) -> Any:
        """The encoder on rows of `Encoding.batch`, with formations in their slots.

        Args:
            rows: the batch.
            shares: of the formations, that of "unknown" last; only for `token`.
            options: of the encoder.
        """
        inputs: dict[str, Any] = {"attention_mask": rows["attention_mask"]}
        if "token_type_ids" in self.tokens_of_encoder:
            inputs["token_type_ids"] = rows["token_type_ids"]
        if shares is None or "token" not in self.options.fusion:
            return self.encoder(input_ids=rows["input_ids"], **inputs, **options)
        words = self.encoder.get_input_embeddings()(rows["input_ids"])
        vectors = (shares @ self.formation_token.weight.to(shares.dtype)).to(words.dtype)
        places = torch.arange(words.shape[1], device=words.device) == rows["slot"][:, None]
        words = torch.where(places[..., None], vectors[:, None], words)
        return self.encoder(inputs_embeds=words, **inputs, **options)

    @property
    def tokens_of_encoder(self) -> tuple[str, ...]:
        """Inputs beside the tokens that this encoder tells apart."""
        kinds = getattr(self.encoder.config, "type_vocab_size", 0)
        return ("token_type_ids",) if kinds > 1 else ()

    def words(self, contexts: Batch) -> Float[Tensor, "texts width"]:
        """r_w, the mean of the word's states in each text."""
        return mean_state(self.run(contexts).last_hidden_state, contexts["target"])

    def formation_logits(self, contexts: Batch) -> Float[Tensor, "texts labels"]:
        """Of the formations that the word may have in each text."""
        if self.options.predictor == "mean":
            inputs = {"input_ids": contexts["input_ids"]}
            if "token_type_ids" in self.tokens_of_encoder:
                inputs["token_type_ids"] = contexts["token_type_ids"]
            mask = contexts["attention_mask"].bool() | self.options.authors
            return self.formation_predictor(self.encoder.embeddings(**inputs), mask)
        found = self.run(contexts, output_hidden_states=True)
        return self.formation_predictor(found.hidden_states[self.layer], contexts["target"])

    def shares(
        self,
        formations: Float[Tensor, "senses labels"],
        known: Tensor,
        logits: Float[Tensor, "senses labels"] | None,
    ) -> Float[Tensor, "senses labels1"]:
        """r: of each sense's formations as they are known, else as the context has them, else unknown.

        Args:
            formations: known shares; a row of zeros is unknown.
            known: [senses] of bool; whether they are to be used.
            logits: from the context.
        """
        source = self.options.formation_source
        if logits is None or source in ("annotation", "lexicon", "gloss"):
            guessed = torch.zeros_like(formations)
        elif source == "predicted":
            guessed = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(formations.dtype)
        else:
            guessed = logits.softmax(1).to(formations.dtype)
        found = torch.where(known[:, None], formations, guessed)
        return torch.cat([found, (1 - found.sum(1, keepdim=True)).clamp_min(0)], 1)

    def vectors(self, shares: Float[Tensor, "senses labels1"]) -> Float[Tensor, "senses width"]:
        """e: the formations' vectors by their shares; zeros where no fusion needs them."""
        if hasattr(self, "formation_embedding"):
            return shares @ self.formation_embedding.weight.to(shares.dtype)
        return shares.new_zeros(shares.shape[0], self.encoder.config.hidden_size)


class FormBertCross(FormBert):
    """GlossBERT's cross-encoder (Huang et al. 2019) with formations; the paper's with `pooled_add`."""

    config_class = FormBertCrossConfig

    def __init__(self, config: FormBertCrossConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.encoder_config().hidden_size, 2)
        self.post_init()

    def forward(
        self,
        pairs: Batch,
        text: Int[Tensor, " pairs"],
        formations: Float[Tensor, "pairs labels"],
        known: Tensor,
        contexts: Batch | None = None,
        logits: Float[Tensor, "texts labels"] | None = None,
    ) -> Scores:
        """Scores of pairs.

        Args:
            pairs: text and gloss, of `Encoding.pair`.
            text: the number of each pair's text.
            formations: known shares of each pair's sense; a row of zeros is unknown.
            known: whether they are to be used, [pairs] of bool.
            contexts: the texts alone; for the predictor.
            logits: what the predictor has said of them already.
        """
        if contexts is not None:
            logits = self.formation_logits(contexts)
        per_pair = None if logits is None else logits[text]
        shares = self.shares(formations, known, per_pair)
        found = self.run(pairs, shares)
        states = found.last_hidden_state
        pooled = getattr(found, "pooler_output", None)
        pooled = self.dropout(states[:, 0] if pooled is None else pooled)
        vectors = self.vectors(shares).to(pooled.dtype)
        answer = self.classifier(self.fusion.pooled(pooled, vectors))
        context, gloss = (mean_state(states, pairs[part]) for part in ("target", "gloss"))
        posterior = None if per_pair is None else per_pair.softmax(1)
        extra = self.fusion.extra(context, gloss, shares.to(states.dtype), vectors, posterior)
        answer = torch.stack([answer[:, 0], answer[:, 1] + extra], 1)
        return Scores(answer[:, 1] - answer[:, 0], answer, logits)


class FormBertBi(FormBert):
    """A bi-encoder after BEM (Blevins and Zettlemoyer 2020), one encoder for texts and glosses."""

    config_class = FormBertBiConfig
    pools = False

    def __init__(self, config: FormBertBiConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        contexts: Batch,
        glosses: Batch,
        text: Int[Tensor, " pairs"],
        sense: Int[Tensor, " pairs"],
        formations: Float[Tensor, "senses labels"],
        known: Tensor,
    ) -> Scores:
        """Scores of pairs of texts and glosses.

        Args:
            contexts: the texts.
            glosses: the senses' glosses, each once.
            text: the number of each pair's text.
            sense: the number of each pair's sense.
            formations: known shares of each sense; a row of zeros is unknown.
            known: whether they are to be used, [senses] of bool.
        """
        words, logits = self.embed_contexts(contexts)
        shares = self.shares(formations, known, None)
        states = self.embed_glosses(glosses, shares)
        scores = self.score(
            words[text], states[sense], shares[sense], None if logits is None else logits[text]
        )
        return Scores(scores, None, logits)

    def embed_contexts(
        self, contexts: Batch
    ) -> tuple[Float[Tensor, "texts width"], Float[Tensor, "texts labels"] | None]:
        """r_w, the mean of the word's states, and the formations' logits where there is a predictor."""
        span = self.options.predictor == "span"
        found = self.run(contexts, output_hidden_states=span)
        words = self.dropout(mean_state(found.last_hidden_state, contexts["target"]))
        if span:
            layer = found.hidden_states[self.layer]
            return words, self.formation_predictor(layer, contexts["target"])
        mean = self.options.predictor == "mean"
        return words, self.formation_logits(contexts) if mean else None

    def embed_glosses(
        self, glosses: Batch, shares: Float[Tensor, "senses labels1"]
    ) -> Float[Tensor, "senses width"]:
        """r_d, the gloss's first state with the formation in it."""
        states = self.run(glosses, shares).last_hidden_state[:, 0]
        return self.fusion.pooled(self.dropout(states), self.vectors(shares).to(states.dtype))

    def score(
        self,
        words: Float[Tensor, "pairs width"],
        glosses: Float[Tensor, "pairs width"],
        shares: Float[Tensor, "pairs labels1"],
        logits: Float[Tensor, "pairs labels"] | None,
    ) -> Float[Tensor, " pairs"]:
        """Of vectors that `embed_contexts` and `embed_glosses` gave, row by row."""
        if self.options.similarity == "cosine":
            likeness = nn.functional.cosine_similarity(words, glosses) / self.options.temperature
        else:
            likeness = (words * glosses).sum(1)
        posterior = None if logits is None else logits.softmax(1)
        shares = shares.to(words.dtype)
        vectors = self.vectors(shares)
        return likeness + self.fusion.extra(words, glosses, shares, vectors, posterior)


CLASSES = {"cross": (FormBertCrossConfig, FormBertCross), "bi": (FormBertBiConfig, FormBertBi)}


def register() -> None:
    """Teach the Auto classes both models."""
    for config, model in CLASSES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)


def build(
    source: str | Path, options: ModelOptions, labels: tuple[str, ...] = NAMES
) -> tuple[FormBert, PreTrainedTokenizerBase]:
    """A model to be trained, with its encoder from a folder or hub id and all else new.

    Args:
        source: of the encoder and its tokenizer.
        options: what the model is.
        labels: formations, or the parts of speech in their place.

    Raises:
        ModelError: the encoder cannot be had, or is none.
    """
    from dataclasses import asdict

    inner = load_config(source)
    tokenizer = load_tokenizer(source)
    encoder = load_model(
        AutoModel, source, new=["pooler"], unused=[r"cls\.", "head", "pooler", "lm_"]
    )
    if not getattr(tokenizer, "is_fast", False) or not hasattr(inner, "num_hidden_layers"):
        raise ModelError(f"{source}: needs an encoder of text with a fast tokenizer")
    encoder = encoder.float()
    encoder.config.dtype = torch.float32
    limit = longest(encoder.config)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if options.marking == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["[TGT]", "[/TGT]"]})
        encoder.resize_token_embeddings(len(tokenizer))
    kind, model = CLASSES[options.arch]
    config = kind(encoder=encoder.config.to_dict(), options=asdict(options), labels=list(labels))
    made = model(config)  # pyright: ignore[reportArgumentType]
    weights = encoder.state_dict()
    lacking = made.encoder.load_state_dict(weights, strict=False).missing_keys
    if lacking:
        raise ModelError(f"{source}: its encoder lacks {lacking[0]}")
    return made, tokenizer


def longest(config: PreTrainedConfig) -> int:
    """Tokens that an encoder has positions for; RoBERTa's begin behind the padding token's number."""
    most = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    offset = int(config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    return most - offset


def load(source: str | Path, **options: Any) -> tuple[FormBert, PreTrainedTokenizerBase]:
    """A trained model and its tokenizer, in evaluation mode.

    Raises:
        ModelError: it cannot be had, or is none of ours.
    """
    register()
    config = load_config(source)
    if not isinstance(config, FormBertConfig):
        raise ModelError(
            f"{source}: is no FormBERT model but {config.model_type}; train one with `formbert train`"
        )
    model = load_model(AutoModel, source, **options)
    return model.eval(), load_tokenizer(source)  # pyright: ignore[reportReturnType]
