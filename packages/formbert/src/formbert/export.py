"""A model as ONNX files, run by ONNX Runtime: in float32, or with weights and products in int8.

    model, tokenizer = load_export(folder, int8=True)
    wsd = Disambiguator(model, tokenizer, inventory)

An export lies in its model's folder, in `onnx` or `onnx-int8`, with a record of the weights it was
made from; when these have changed it is refused. No float32 graph is kept that does not compute what
the model does. Formations are resolved outside the graphs, so that any inventory and any source of
formations may be used afterwards.

A cross-encoder gives the graphs `pairs` and, with a predictor, `contexts`, which holds no more layers
than the predictor reads; a bi-encoder gives `contexts`, `glosses` and `score`.
"""

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from octavo.console import progress
from octavo.errors import ConfigError, ModelError
from octavo.models import load_config, load_tokenizer
from octavo.rundir import atomic, write_json
from octavo.runtime import Runtime
from torch import Tensor, nn

from formbert import __version__
from formbert.data import Instance
from formbert.encode import Encoding, Span
from formbert.modeling import (
    Batch,
    FormBert,
    FormBertBi,
    FormBertConfig,
    FormBertCross,
    Scores,
    load,
    register,
)
from formbert.predictions import Prediction

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: How far a float32 graph's numbers may lie from PyTorch's, for numbers of size 1 and below.
TOLERANCE = 1e-4

#: Bytes of weights from which on they lie in a file of their own; a protobuf ends at 2 GiB.
SINGLE_FILE = 1_900_000_000

RECORD = "export.json"

#: Tokens of the texts on which a graph is compared with its model, a batch each.
PROBES = ((1, 2, 5, 8, 13, 21, 30), (1,), (3, 8), tuple(range(1, 17)), (500,))

#: The tensors of `Encoding.batch`, in its order.
ROWS = ("input_ids", "attention_mask", "token_type_ids", "target", "gloss", "slot")


@dataclass(frozen=True)
class Graph:
    """One graph of a model.

    Attributes:
        compute: from inputs by their names to one tensor or several.
        inputs: names, in order.
        outputs: likewise.
        quantised: whether its products may be in int8.
    """

    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    quantised: bool = True


def graphs_of(model: FormBert) -> dict[str, Graph]:
    """What is exported of a model, by name."""
    predicts = model.options.predictor != "none"
    logits = ("logits",) * predicts
    if isinstance(model, FormBertCross):

        def pairs(shares: Tensor, logits: Tensor | None = None, **rows: Tensor) -> Any:
            count = shares.shape[0]
            return model(
                rows, torch.arange(count), shares[:, :-1], torch.ones(count, dtype=torch.bool),
                logits=logits,
            ).logits  # fmt: skip

        graphs = {"pairs": Graph(pairs, (*ROWS, "shares", *logits), ("answer",))}
        if predicts:
            graphs["contexts"] = Graph(lambda **rows: model.formation_logits(rows), ROWS, logits)
        return graphs
    assert isinstance(model, FormBertBi)

    def contexts(**rows: Tensor) -> Any:
        words, found = model.embed_contexts(rows)
        return words if found is None else (words, found)

    def score(
        words: Tensor, glosses: Tensor, shares: Tensor, logits: Tensor | None = None
    ) -> Tensor:
        return model.score(words, glosses, shares, logits)

    return {
        "contexts": Graph(contexts, ROWS, ("words", *logits)),
        "glosses": Graph(
            lambda shares, **rows: model.embed_glosses(rows, shares), (*ROWS, "shares"), ("states",)
        ),
        "score": Graph(score, ("words", "glosses", "shares", *logits), ("scores",), False),
    }


def export_model(folder: Path, int8: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Write a trained model as ONNX, for any batch and length, into its own folder.

    Args:
        folder: the model's.
        int8: quantise weights and products to 8 bits; embeddings and the bi-encoder's scores stay.
        overwrite: replace an export that lies there.

    Returns:
        A row a graph: `graph`, `megabytes`, and `difference`, the largest distance of its numbers from
        PyTorch's, relative where they are above 1.

    Raises:
        ConfigError: an export lies there already, or ONNX Runtime is not installed.
        ModelError: there is no such model, it cannot be exported, or a graph computes something else.
    """
    _need_packages()
    final = _place(folder, int8)
    if final.exists() and not overwrite:
        raise ConfigError(f"{final} exists already; add --overwrite to replace it")
    model, tokenizer = load(folder, dtype=torch.float32)
    encoding = Encoding(tokenizer, model.options)
    rows = []
    with atomic(final) as temporary:
        temporary.mkdir()
        for name, graph in progress(list(graphs_of(model).items()), "export", unit="graphs"):
            probes = _probes(model, encoding, graph)
            file = temporary / f"{name}.onnx"
            _write(model, graph, probes[0], file)
            difference = _compare(graph, probes, file)
            if not difference <= TOLERANCE:
                raise ModelError(
                    f"{folder}: its ONNX graph {name!r} computes otherwise than the model (off by "
                    f"{difference:.1e}, for its size); nothing was written"
                )
            if int8 and graph.quantised:
                _quantise(file)
                difference = _compare(graph, probes, file)
                if not difference < float("inf"):
                    raise ModelError(f"{folder}: gives numbers that are not finite in int8")
            size = sum(part.stat().st_size for part in temporary.glob(f"{file.name}*"))
            rows.append({"graph": name, "megabytes": size / 1e6, "difference": difference})
        record = {
            "created_by": f"formbert {__version__}", "weights": weights_hash(folder), "graphs": rows
        }  # fmt: skip
        write_json(temporary / RECORD, record)
    return rows


def load_export(
    folder: str | Path, int8: bool = False, runtime: Runtime = Runtime()
) -> tuple[FormBert, "PreTrainedTokenizerBase"]:
    """An exported model and its tokenizer, as `modeling.load` gives the model itself.

    Args:
        folder: the model's.
        int8: which export.
        runtime: threads; the device is the CPU.

    Returns:
        A `FormBertCross` or `FormBertBi` that computes by the graphs and holds no weights: it cannot be
        trained or saved.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        ModelError: there is no export, it was made from other weights, or it cannot be read.
    """
    _need_packages()
    folder = Path(folder).expanduser()
    place = _place(folder, int8)
    command = f"formbert export --model {folder}" + " --int8" * int8
    if not place.is_dir():
        raise ModelError(f"{place}: no export there; run `{command}`")
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        weights, names = record["weights"], [row["graph"] for row in record["graphs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{place}: is damaged; run `{command} --overwrite`") from None
    if weights != weights_hash(folder):
        raise ModelError(
            f"{place}: was not made from the model beside it as it is now; run `{command} --overwrite`"
        )
    sessions = {name: _session(place / f"{name}.onnx", runtime) for name in names}
    register()
    config: Any = load_config(folder)
    kind = ExportedCross if config.model_options.arch == "cross" else ExportedBi
    return kind(config, sessions, f"{weights} {place.name}").eval(), load_tokenizer(folder)


def weights_hash(folder: Path) -> str:
    """A hash of a saved model's weights, and of the options that its graphs were made by.

    Raises:
        ModelError: there are no weights.
    """
    register()
    config = load_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not isinstance(config, FormBertConfig):
        raise ModelError(f"{folder}: holds no weights of a FormBERT model (*.safetensors)")
    content = hashlib.sha256()
    options = {"encoder": config.encoder, "options": config.options, "labels": config.labels}
    content.update(json.dumps(options, sort_keys=True, default=str).encode())
    for file in files:
        with file.open("rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    return content.hexdigest()[:32]


def compare_answers(
    first: Sequence[Prediction], second: Sequence[Prediction], instances: Sequence[Instance]
) -> dict[str, float]:
    """How an export's answers compare with its model's, on words of more than one sense.

    Args:
        first: the model's answers, with all candidates.
        second: the export's.
        instances: what was asked, with the right senses.

    Returns:
        `instances` that a model was needed for; `agreement`, the share that got one answer; `accuracy`
        of the model and `accuracy_export`; `difference`, the largest of a candidate's probabilities.
    """
    asked = [
        (one, other, instance)
        for one, other, instance in zip(first, second, instances, strict=True)
        if len(one.candidates) > 1
    ]
    count = max(len(asked), 1)
    gaps = [0.0]
    for one, other, _ in asked:
        there = {candidate.sense_id: candidate.probability for candidate in other.candidates}
        gaps += [abs(each.probability - there[each.sense_id]) for each in one.candidates]
    return {
        "instances": len(asked),
        "agreement": sum(one.sense_id == other.sense_id for one, other, _ in asked) / count,
        "accuracy": sum(one.sense_id in instance.gold for one, _, instance in asked) / count,
        "accuracy_export": sum(two.sense_id in instance.gold for _, two, instance in asked) / count,
        "difference": max(gaps),
    }


class _Exported(FormBert):
    """What both exported models share: no weights, but the sessions of their graphs."""

    def __init__(
        self, config: FormBertConfig, sessions: Mapping[str, "InferenceSession"], name: str
    ) -> None:
        super(FormBert, self).__init__(config)  # past the weights that FormBert makes
        self.options = config.model_options
        self.sessions = dict(sessions)
        # stands for the weights, for whoever hashes them: the cache of glosses
        self.register_buffer("made_from", torch.tensor(list(name.encode()), dtype=torch.uint8))

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        return torch.float32

    def compute(self, name: str, feed: Mapping[str, Tensor | None]) -> list[Tensor]:
        """The outputs of one graph."""
        return _run(self.sessions[name], feed)

    def words(self, contexts: Batch) -> Tensor:
        """See `FormBert`; a cross-encoder's export does not hold what it takes.

        Raises:
            ConfigError: the model is a cross-encoder.
        """
        if self.options.arch == "cross":
            raise ConfigError(
                "a cross-encoder's export has no vectors of contexts; use the model itself"
            )
        return self.compute("contexts", contexts)[0]


class ExportedCross(_Exported, FormBertCross):
    """A cross-encoder's graphs in its place.

    Args:
        config: the model's.
        sessions: by the graphs' names.
        name: of the weights and the precision.
    """

    def formation_logits(self, contexts: Batch) -> Tensor:
        """See `FormBert`."""
        return self.compute("contexts", contexts)[0]

    def forward(
        self,
        pairs: Batch,
        text: Tensor,
        formations: Tensor,
        known: Tensor,
        contexts: Batch | None = None,
        logits: Tensor | None = None,
    ) -> Scores:
        """See `FormBertCross`."""
        if contexts is not None:
            logits = self.formation_logits(contexts)
        per_pair = None if logits is None else logits[text]
        shares = self.shares(formations, known, per_pair)
        (answer,) = self.compute("pairs", {**pairs, "shares": shares, "logits": per_pair})
        return Scores(answer[:, 1] - answer[:, 0], answer, logits)


class ExportedBi(_Exported, FormBertBi):
    """A bi-encoder's graphs in its place; see `ExportedCross`."""

    def formation_logits(self, contexts: Batch) -> Tensor:
        """See `FormBert`."""
        return self.compute("contexts", contexts)[1]

    def embed_contexts(self, contexts: Batch) -> tuple[Tensor, Tensor | None]:
        """See `FormBertBi`."""
        words, *logits = self.compute("contexts", contexts)
        return words, logits[0] if logits else None

    def embed_glosses(self, glosses: Batch, shares: Tensor) -> Tensor:
        """See `FormBertBi`."""
        return self.compute("glosses", {**glosses, "shares": shares})[0]

    def score(
        self, words: Tensor, glosses: Tensor, shares: Tensor, logits: Tensor | None
    ) -> Tensor:
        """See `FormBertBi`."""
        feed = {"words": words, "glosses": glosses, "shares": shares, "logits": logits}
        return self.compute("score", feed)[0]


def _place(folder: Path, int8: bool) -> Path:
    return folder / ("onnx-int8" if int8 else "onnx")


def _need_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"exports need packages that are not here ({error.name}); pip install 'formbert[onnx]'"
        ) from None


def _session(file: Path, runtime: Runtime = Runtime()) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime.threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    # graphs take turns: a thread that waits for its own must not keep a core busy
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of several kinds, which have no common class
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(
            f"{file}: cannot be read ({reason}); run `formbert export` again"
        ) from None


def _run(session: "InferenceSession", feed: Mapping[str, Tensor | None]) -> list[Tensor]:
    """Outputs; what the graph does not read, such as the segments of one that has none, is left out."""
    inputs = {}
    for given in session.get_inputs():
        value = feed[given.name]
        assert value is not None  # a model with a predictor is given what it said
        inputs[given.name] = value.contiguous().numpy()
    return [torch.from_numpy(output) for output in session.run(None, inputs)]


class _Module(nn.Module):
    """A graph's computation as a module that takes its inputs in order, with the weights it uses."""

    def __init__(self, model: "PreTrainedModel", graph: Graph) -> None:
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, *values: Tensor) -> Any:
        return self.graph.compute(**dict(zip(self.graph.inputs, values, strict=True)))


def _write(model: FormBert, graph: Graph, probe: Mapping[str, Tensor], file: Path) -> None:
    free = torch.export.Dim.DYNAMIC
    of_tokens = set(ROWS) - {"slot"}
    shapes = tuple({0: free, 1: free} if name in of_tokens else {0: free} for name in graph.inputs)
    size = sum(weight.nbytes for weight in model.state_dict().values())
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Module(model, graph).eval(),
                tuple(probe[name] for name in graph.inputs),
                dynamo=True,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=(shapes,),
                verbose=False,
            )
            assert program is not None  # as it is with dynamo
            program.save(file, external_data=size > SINGLE_FILE)
    except Exception as error:  # whatever the encoder's own code ran into
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:160]
        kind = model.config.encoder_config().model_type
        raise ModelError(
            f"this model, on an encoder of kind {kind!r}, cannot be exported to ONNX ({reason}); use "
            "it as it is"
        ) from error


def _quantise(file: Path) -> None:
    """Matrix products in int8, weights by column, activations by their range in each batch."""
    from onnxruntime.quantization import quantize_dynamic

    weights = file.with_name(f"{file.name}.data")
    with _quiet(), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        plain = Path(folder) / file.name
        for part in (file, weights):
            if part.exists():
                part.rename(plain.with_name(part.name))
        quantize_dynamic(
            plain, file, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            use_external_data_format=plain.with_name(weights.name).exists(),
        )  # fmt: skip


def _probes(model: FormBert, encoding: Encoding, graph: Graph) -> list[dict[str, Tensor]]:
    """Inputs made of random tokens, vectors and shares, of several shapes and with padding."""
    generator = torch.Generator().manual_seed(0)
    labels, width = len(model.config.labels or ()), model.config.encoder_config().hidden_size
    paired = "pairs" if isinstance(model, FormBertCross) and "shares" in graph.inputs else ""
    probes = []
    for sizes in PROBES:
        rows = []
        for size in sizes:
            first, second = (
                tuple(torch.randint(len(encoding.tokenizer), (size,), generator=generator).tolist())
                for _ in range(2)
            )
            span = Span(first, size // 2, size // 2 + 1)
            if paired:
                rows.append(encoding.pair(span, second))
            else:
                rows.append(
                    encoding.gloss(first) if "shares" in graph.inputs else encoding.context(span)
                )
        known = torch.rand(len(sizes), labels + 1, generator=generator)
        probe = encoding.batch(rows) | {
            "shares": known / known.sum(1, keepdim=True),
            "logits": torch.randn(len(sizes), labels, generator=generator),
            "words": torch.randn(len(sizes), width, generator=generator),
            "glosses": torch.randn(len(sizes), width, generator=generator),
        }
        probes.append({name: probe[name] for name in graph.inputs})
    return probes


def _compare(graph: Graph, probes: Sequence[Mapping[str, Tensor]], file: Path) -> float:
    """The largest distance of the graph's numbers from the model's, relative where they are above 1."""
    session = _session(file)
    difference = 0.0
    for probe in probes:
        with torch.inference_mode():
            wanted = graph.compute(**probe)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for got, each in zip(_run(session, probe), wanted, strict=True):
            far = (got - each).abs().max() / each.abs().max().clamp_min(1)
            difference = max(difference, float(far.nan_to_num(nan=float("inf"))))
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notices off meanwhile; some go past every logger's own level."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers  # the first `logging.warning` anywhere adds one
