"""Stages as ONNX files, run by ONNX Runtime: in float32, or with weights and products in int8.

An export lies in its model's folder, `onnx/model.onnx` or `onnx/model-int8.onnx`, beside a small JSON
that names the weights it was made from; when these have changed it is refused. No export is kept that
does not answer as the model does.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from octavo import console
from octavo.errors import ConfigError, ModelError
from octavo.rundir import atomic, refuse_existing, write_json
from octavo.runtime import Runtime
from torch import Tensor

from cascadebert import __version__
from cascadebert.data import Examples
from cascadebert.stage import Forward, Stage

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

#: How a stage is loaded that is to be exported.
PLAIN = Runtime(device="cpu", dtype="float32")

#: Bytes of weights from which on they lie in a file of their own; a protobuf ends at 2 GiB.
SINGLE_FILE = 1_900_000_000

#: How far the logits of a float32 export may lie from PyTorch's, for logits of size 1 and below.
TOLERANCE = 1e-4

#: Words of the texts on which an export is compared with its model, a batch each.
PROBES = ((1,), (3, 8), (1, 2, 5, 8, 13, 21, 30), tuple(range(1, 33)), (500,))

Kind = Literal["onnx", "onnx-int8"]
FILES = {"onnx": "model.onnx", "onnx-int8": "model-int8.onnx"}
NAMES = {"onnx": "onnx-float32", "onnx-int8": "onnx-int8"}


@dataclass(frozen=True)
class Export:
    """An exported stage, and how it compares with its model.

    Attributes:
        file: the ONNX file.
        megabytes: of it and its weights.
        difference: the largest of its logits' distances from PyTorch's in float32.
        agreement: share of the probes that get the same label, 0 to 1.
    """

    file: Path
    megabytes: float
    difference: float
    agreement: float


def export_cascade(
    stages: Sequence[Stage], folders: Sequence[Path], int8: bool = False, overwrite: bool = False
) -> list[Export]:
    """Export every stage into its own model's folder.

    Args:
        stages: loaded with the runtime `PLAIN`.
        folders: where each was loaded from.
        int8: quantise weights and products to 8 bits.
        overwrite: replace exports that lie there.

    Raises:
        ConfigError: an export lies there already, or ONNX Runtime is not installed.
        ModelError: a stage cannot be exported, or its export answers otherwise.
    """
    _need_packages()
    for folder in folders:
        if not folder.is_dir():
            raise ModelError(
                f"{folder}: an export lies in its model's folder, and this is none; download the "
                "model into a folder and name that"
            )
        refuse_existing(_file(folder, "onnx-int8" if int8 else "onnx"), overwrite)
    work = list(zip(stages, folders, strict=True))
    return [
        export_stage(stage, folder, int8)
        for stage, folder in console.progress(work, "export", unit="stages")
    ]


def export_stage(stage: Stage, folder: Path, int8: bool = False) -> Export:
    """Write one stage as ONNX, for any batch and length, and compare it with its model.

    Args:
        stage: loaded with the runtime `PLAIN`.
        folder: its model's folder; an export that lies in it is replaced.
        int8: quantise weights and products to 8 bits, the embeddings stay in float32.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        ModelError: the stage cannot be exported, or the export answers otherwise than its model.
    """
    _need_packages()
    kind: Kind = "onnx-int8" if int8 else "onnx"
    final = _file(folder, kind)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=final.parent) as name:
        made = Path(name) / FILES["onnx"]
        _write_graph(stage, made)
        difference, agreement = _compare(stage, made)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"{folder}: its ONNX export answers otherwise than the model (a logit is off by "
                f"{difference:.1e}, for its size); nothing was written"
            )
        if int8:
            made = _quantise(made)
            difference, agreement = _compare(stage, made)
            if not difference < float("inf"):
                raise ModelError(f"{folder}: gives logits that are not finite in int8")
        parts = sorted(Path(name).glob(f"{made.name}*"))
        size = sum(part.stat().st_size for part in parts) / 1e6
        record = {
            "created_by": f"cascadebert {__version__}",
            "weights": stage.weights,
            "files": [part.name for part in parts],
            "difference": difference,
            "agreement": agreement,
        }
        # without its record an export does not count, so that a kill in between leaves none
        _record(final).unlink(missing_ok=True)
        for old in final.parent.glob(f"{final.name}*"):
            old.unlink()
        for part in parts:
            with atomic(final.parent / part.name) as temporary:
                part.replace(temporary)
        write_json(_record(final), record)
    return Export(final, size, difference, agreement)


def onnx_forward(
    folder: Path, backend: str, weights: str, runtime: Runtime = Runtime()
) -> tuple[Forward, str]:
    """What runs an exported stage.

    Args:
        folder: the model's.
        backend: onnx or onnx-int8.
        weights: hash of the model's weights, which must be those that were exported.
        runtime: device and threads; CUDA where ONNX Runtime has it, for float32 only.

    Returns:
        The forward function, logits on the CPU, and the backend's name with its precision.

    Raises:
        ConfigError: ONNX Runtime is not installed, or another precision is asked for.
        ModelError: there is no export, it was made from other weights, or it cannot be read.
    """
    import json

    _need_packages()
    kind: Kind = "onnx-int8" if backend == "onnx-int8" else "onnx"
    if runtime.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"--dtype {runtime.dtype}: --backend {backend} has its own precision; leave --dtype away"
        )
    file = _file(folder.expanduser(), kind)
    command = "cascadebert export --model DIR" + " --int8" * (kind == "onnx-int8")
    if not file.is_file():
        raise ModelError(f"{file}: no export there; run `{command}` with the same models")
    try:
        record = json.loads(_record(file).read_text(encoding="utf-8"))
        exported = record["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        exported = ""
    if exported != weights:
        raise ModelError(
            f"{file}: was not made from the weights beside it; run `cascadebert export` again, as "
            f"`{command} --overwrite`"
        )
    session = _session(file, kind, runtime)
    inputs = [given.name for given in session.get_inputs()]

    def forward(batch: dict[str, Tensor]) -> Tensor:
        feed = {name: batch[name].numpy() for name in inputs}
        (logits,) = session.run(["logits"], feed)
        return torch.from_numpy(logits)

    return forward, NAMES[kind]


def _file(folder: Path, kind: Kind) -> Path:
    return folder / "onnx" / FILES[kind]


def _record(file: Path) -> Path:
    return file.with_suffix(".json")


def _need_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the ONNX backends need packages that are not here ({error.name}); "
            'pip install "cascadebert[onnx]"'
        ) from None


def _session(file: Path, kind: Kind, runtime: Runtime) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime.threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    # several stages share the cores: a thread that waits for its turn must not keep one busy
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    device = runtime.torch_device()
    on_cuda = device.type == "cuda" and kind == "onnx"  # dynamic int8 has kernels for CPUs alone
    if on_cuda and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # of several kinds, which have no common class
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(
            f"{file}: cannot be read ({reason}); run `cascadebert export` again"
        ) from None


class _Logits(torch.nn.Module):
    """A classifier that takes its inputs in order and gives logits in float32."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True))).logits.float()


def _write_graph(stage: Stage, file: Path) -> None:
    batch = _probes(stage)[1]
    names = list(batch)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    size = sum(weight.nbytes for weight in stage.model.state_dict().values())
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Logits(stage.model, names).eval(),
                tuple(batch.values()),
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple(free for _ in names),),
                verbose=False,
            )
            assert program is not None  # as it is with dynamo
            program.save(file, external_data=size > SINGLE_FILE)
    except Exception as error:  # whatever the model's own code ran into
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:160]
        raise ModelError(
            f"{stage.name}: {type(stage.model).__name__} cannot be exported to ONNX ({reason}); "
            "use --backend torch or compile"
        ) from error


def _quantise(file: Path) -> Path:
    """Matrix products in int8, weights by column, activations by their range in each batch."""
    from onnxruntime.quantization import quantize_dynamic

    out = file.with_name(FILES["onnx-int8"])
    with _quiet():
        quantize_dynamic(
            file,
            out,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            use_external_data_format=file.with_name(f"{file.name}.data").exists(),
        )
    return out


def _probes(stage: Stage) -> list[dict[str, Tensor]]:
    """Batches of random texts, single ones and pairs, of several shapes and with padding."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(len(stage.tokenizer), int(stage.model.config.vocab_size or 0))
    batches = []
    for number, sizes in enumerate(PROBES):
        texts = [
            str(stage.tokenizer.decode(torch.randint(vocabulary, (size,), generator=generator)))
            for size in sizes
        ]
        pairs = texts[::-1] if number % 2 else None
        batches.append(stage.pad(stage.encode(Examples(texts, pairs)).rows))
    return batches


def _compare(stage: Stage, file: Path) -> tuple[float, float]:
    """Largest difference of the logits, relative where they are above 1, and agreement in labels."""
    session = _session(file, "onnx", PLAIN)
    inputs = [given.name for given in session.get_inputs()]
    difference, same, total = 0.0, 0, 0
    for batch in _probes(stage):
        with torch.inference_mode():
            wanted = stage.model(**batch).logits
        (output,) = session.run(["logits"], {name: batch[name].numpy() for name in inputs})
        got = torch.from_numpy(output)
        far = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1)
        difference = max(difference, float(far.nan_to_num(nan=float("inf"))))
        same += int((got.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
        total += len(wanted)
    return difference, same / total


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
