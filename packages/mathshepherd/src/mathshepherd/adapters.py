"""Public process reward models, each by declaration: how it reads a solution, and where its scores are.

A checkpoint's own code is never run: the base model is the library's, and a head of its own is a few
linear layers, whose weights are read by name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from octavo.errors import ConfigError, DataError, ModelError
from octavo.models import load_model, load_tokenizer
from torch import Tensor, nn

from mathshepherd.generate import context, encode
from mathshepherd.reward_model import (
    StepRewardModel,
    fitting,
    model_folder,
    score_rows,
    two_rows,
    two_rows_tell,
)
from mathshepherd.steps import StepTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Marked:
    """A solution as a model reads it.

    Attributes:
        ids: its tokens.
        places: the token of each step at which the hidden state tells of it.
    """

    ids: list[int]
    places: list[int]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family of reward models reads.

    Attributes:
        checkpoints: public ones.
        write: makes tokens and places of a question and its steps; None where `StepRewardModel` does.
        separator: ends a step, and may stand in none.
        system: message at the head of the chat.
        head: names of the head's linear layers in the checkpoint, with ReLUs between them; one output
            is a logit, two are those of a bad and a good step. None for two rows of the output matrix.
    """

    checkpoints: tuple[str, ...]
    write: "Callable[[PreTrainedTokenizerBase, Family, str, Sequence[str]], Marked] | None" = None
    separator: str = ""
    system: str = ""
    head: tuple[str, ...] = ()


def as_turns(
    tokenizer: "PreTrainedTokenizerBase", family: Family, question: str, steps: Sequence[str]
) -> Marked:
    """Each step is a user's turn, the first one behind the question; the assistant answers + or -.

    The answers' places are where the conversations full of + and full of - differ, so that any chat
    template and any step will do. A verdict is predicted by the token before it. The answers written
    are all +, as RLHFlow's evaluation has it (math-rm/prm_evaluate.py, one pass a step; since no later
    token is seen, one pass gives all).

    Raises:
        ModelError: the tokenizer has no chat template, or joins the answers with their neighbours.
    """
    texts = [f"{question} {steps[0]}", *steps[1:]]
    good, bad = (_conversation(tokenizer, texts, verdict) for verdict in "+-")
    differ = [n for n, (one, other) in enumerate(zip(good, bad, strict=False)) if one != other]
    if len(good) != len(bad) or len(differ) != len(steps):
        raise ModelError(
            f"{len(differ)} places tell + from - in a chat of {len(steps)} steps: the tokenizer joins "
            "them with their neighbours"
        )
    return Marked(good, [n - 1 for n in differ])


def as_lines(
    tokenizer: "PreTrainedTokenizerBase", family: Family, question: str, steps: Sequence[str]
) -> Marked:
    """The first token, the question and a line break; steps, each tokenised by itself and ended.

    After prepare_input of Skywork's inference code (skywork-o1-prm-inference, model_utils/io_utils.py).

    Raises:
        ModelError: the tokenizer names no first token.
    """
    if not tokenizer.bos_token:
        raise ModelError("the tokenizer names no bos_token, with which each text begins")
    ids, places = encode(tokenizer, f"{tokenizer.bos_token}{question}\n"), []
    end = _ids(tokenizer, family.separator)[-1]
    for step in steps:
        ids += [*_ids(tokenizer, step), end]
        places.append(len(ids) - 1)
    return Marked(ids, places)


def as_chat(
    tokenizer: "PreTrainedTokenizerBase", family: Family, question: str, steps: Sequence[str]
) -> Marked:
    """A chat of system message, question and the solution, with a mark behind each step.

    After the model card of Qwen2.5-Math-PRM-7B.

    Raises:
        DataError: the question holds the mark.
        ModelError: there is no chat template, or the mark is not one token.
    """
    mark = family.separator
    if mark in question:
        raise DataError(f"a question holds {mark!r}: {question[:60]!r}")
    if len(_ids(tokenizer, mark)) != 1:
        raise ModelError(f"{mark!r} is not one token for this model")
    ids = _chat(
        tokenizer,
        [
            {"role": "system", "content": family.system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "".join(f"{step}{mark}" for step in steps)},
        ],
    )
    places = [n for n, one in enumerate(ids) if one == _ids(tokenizer, mark)[0]]
    if len(places) != len(steps):
        raise ModelError(f"{len(steps)} steps and {len(places)} marks {mark!r} in the chat")
    return Marked(ids, places)


def _conversation(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], verdict: str
) -> list[int]:
    turns = [
        turn
        for text in texts
        for turn in (("user", text), ("assistant", verdict))
    ]  # fmt: skip
    return _chat(tokenizer, [{"role": role, "content": content} for role, content in turns])


def _chat(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> list[int]:
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the tokenizer's chat template cannot write this ({first})") from None
    return _ids(tokenizer, text)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore


#: The families by name. Sources: the model cards, and the evaluation code of search-and-learn
#: (src/sal/models/reward_models.py) and PRMBench (mr_eval/models).
FAMILIES: Mapping[str, Family] = {
    # Wang et al. (2024): the words + and - at the tag ки
    "math-shepherd": Family(
        checkpoints=("peiyi9979/math-shepherd-mistral-7b-prm",), separator="ки"
    ),
    # Xiong et al. (2024): + or - as the assistant's answer to each step
    "rlhflow": Family(
        checkpoints=(
            "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data",
            "RLHFlow/Llama3.1-8B-PRM-Mistral-Data",
        ),
        write=as_turns,
    ),
    # Skywork o1 team (2024): TRL's value head, and its sigmoid
    "skywork": Family(
        checkpoints=(
            "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B",
            "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B",
        ),
        write=as_lines,
        separator="\n",
        head=("v_head.summary",),
    ),
    # Zhang et al. (2025): two classes, of which the second is a good step
    "qwen": Family(
        checkpoints=(
            "Qwen/Qwen2.5-Math-PRM-7B",
            "Qwen/Qwen2.5-Math-PRM-72B",
            "Qwen/Qwen2.5-Math-7B-PRM800K",
        ),
        write=as_chat,
        separator="<extra_0>",
        system="Please reason step by step, and put your final answer within \\boxed{}.",
        head=("score.0", "score.2"),
    ),
}


class FamilyScorer:
    """Scores steps with a model of a family.

    Args:
        model: the base model; with its output matrix where the family has no head.
        tokenizer: its own.
        family: how it reads.
        head: of the family, or None.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        family: Family,
        head: nn.Module | None = None,
    ) -> None:
        self.model, self.tokenizer, self.family, self.head = model, tokenizer, family, head
        if head is None:
            self.words = _verdicts(tokenizer)
            self.exact = two_rows_tell(model, self.words)

    def step_scores(
        self,
        questions: Sequence[str],
        solutions: Sequence[Sequence[str]],
        *,
        batch_tokens: int = 16384,
        skip_long: bool = False,
    ) -> list[np.ndarray]:
        """Scores of each solution's steps, one pass a solution; see `StepRewardModel.step_scores`.

        Args:
            questions: one for each solution.
            solutions: steps as they are, without marks.
            batch_tokens: tokens in one batch, padding included.
            skip_long: give none for a solution that is longer than the model's context.

        Returns:
            For each solution an array [steps] of float32 in [0, 1].

        Raises:
            DataError: a solution has no steps, a step is blank or holds the separator, or a solution
                is longer than the model's context.
            ModelError: the tokenizer cannot write it as the family does, or a score is NaN.
        """
        texts = []
        for number, (question, steps) in enumerate(zip(questions, solutions, strict=True)):
            if self.family.separator == "\n":  # a step is one line there
                steps = [step.strip().replace("\n", " ") for step in steps]
            self._check(number, steps)
            texts.append((question.strip(), tuple(step.strip() for step in steps)))
        numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        write = self.family.write or as_turns
        rows = [write(self.tokenizer, self.family, *text) for text in numbers]
        found = score_rows(
            [row.ids for row in rows], lambda batch: self._score([rows[n] for n in batch]),
            batch_tokens, context(self.model) if skip_long else None,
        )  # fmt: skip
        return [found[numbers[text]] for text in texts]

    def _check(self, number: int, steps: Sequence[str]) -> None:
        if not steps:
            raise DataError(f"solution {number}: has no steps to score")
        for n, step in enumerate(steps, 1):
            where = f"solution {number}, step {n} of {len(steps)}"
            if not step.strip():
                raise DataError(f"{where}: is blank")
            if self.family.separator and self.family.separator in step.strip():
                raise DataError(f"{where}: holds {self.family.separator!r}, which ends a step")

    def _score(self, rows: Sequence[Marked]) -> list[Tensor]:
        ids, mask = fitting(self.model, [row.ids for row in rows])
        lines = torch.arange(len(rows)).repeat_interleave(
            torch.tensor([len(row.places) for row in rows])
        )
        places = torch.tensor([place for row in rows for place in row.places])
        logits = self._logits(ids, mask, lines.to(ids.device), places.to(ids.device))
        return list(torch.sigmoid(logits).split([len(row.places) for row in rows]))

    def _logits(
        self, ids: Tensor, mask: Tensor, lines: Tensor, places: Tensor
    ) -> Float[Tensor, " steps"]:
        """Logits of good against bad at some places of a batch."""
        model: Any = self.model
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.head is not None:
            found = self.head(model(**inputs).last_hidden_state[lines, places].float())
            return found[:, 0] if found.shape[1] == 1 else found[:, 1] - found[:, 0]
        if self.exact:
            states = model.get_decoder()(**inputs).last_hidden_state[lines, places]
            return two_rows(model, states, self.words)
        logits = model(**inputs).logits[lines, places].float()
        return logits[:, self.words.good] - logits[:, self.words.bad]


def _verdicts(tokenizer: "PreTrainedTokenizerBase") -> StepTokens:
    """The tokens of + and - as an assistant's answers."""
    (place,) = as_turns(tokenizer, FAMILIES["rlhflow"], "1", ["2"]).places
    good, bad = (_conversation(tokenizer, ["1 2"], verdict)[place + 1] for verdict in "+-")
    return StepTokens(tag=good, good=good, bad=bad)


def open_scorer(
    source: str, family: str | None = None, device: "torch.device | str" = "cpu", dtype: Any = None,
    allow_pickle: bool = False,
) -> StepRewardModel | FamilyScorer:  # fmt: skip
    """What scores steps with a reward model of this project or a public one.

    Args:
        source: folder or hub id.
        family: one of `FAMILIES`; None for what `mathshepherd` trains.
        device: where it computes.
        dtype: of the base model's weights; the checkpoint's own by default. A head is float32.
        allow_pickle: load pickles where there are no safetensors files; only plain weights are taken.

    Raises:
        ConfigError: there is no such family.
        ModelError: there is no such model, or its weights are not of this family.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    if family is not None and family not in FAMILIES:
        raise ConfigError(f"--family {family}: is none of {', '.join(FAMILIES)}")
    declared = FAMILIES[family or "math-shepherd"]
    if declared.write is None:
        return StepRewardModel.load(source, device=device, dtype=dtype, allow_pickle=allow_pickle)
    folder = model_folder(source)
    tokenizer = load_tokenizer(folder)
    head = load_head(folder, declared.head, allow_pickle) if declared.head else None
    unused = [rf"^{re.escape(name)}\." for name in declared.head] + [r"^lm_head\."]
    kind, unused = (AutoModel, unused) if head else (AutoModelForCausalLM, [])
    model: Any = load_model(
        kind, folder, unused=unused, allow_pickle=allow_pickle, dtype=dtype or "auto"
    )
    if head is not None and head[0].in_features != model.config.get_text_config().hidden_size:
        raise ModelError(f"{folder}: {declared.head[0]} does not fit the model's hidden states")
    return FamilyScorer(model.to(device).eval(), tokenizer, declared, head and head.to(device))


def load_head(source: str, names: Sequence[str], allow_pickle: bool = False) -> nn.Sequential:
    """Linear layers of a checkpoint with ReLUs between them, in float32.

    Args:
        source: folder or hub id.
        names: of the layers in the checkpoint.
        allow_pickle: as in `load_tensors`.

    Raises:
        ModelError: one is missing, or they do not fit together.
    """
    parts = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    weights = load_tensors(source, parts, allow_pickle)
    layers: list[nn.Module] = []
    width = None
    for name in names:
        weight, bias = (weights[f"{name}.{part}"].float() for part in ("weight", "bias"))
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not fits or width not in (None, weight.shape[1]):
            raise ModelError(f"{source}: {name} has an unknown shape {tuple(weight.shape)}")
        linear, width = nn.Linear(weight.shape[1], weight.shape[0]), weight.shape[0]
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, nn.ReLU()]
    if width not in (1, 2):
        raise ModelError(f"{source}: {names[-1]} has {width} outputs, and must have 1 or 2")
    return nn.Sequential(*layers[:-1]).eval()


def load_tensors(
    source: str, names: Sequence[str], allow_pickle: bool = False
) -> dict[str, Tensor]:
    """Some weights of a checkpoint by name, from one safetensors file or several with an index.

    Args:
        source: folder or hub id.
        names: of the weights.
        allow_pickle: take them from pickles where there are no such files, as plain weights alone.

    Raises:
        ModelError: a file or a weight is missing or damaged.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        found: dict[str, Tensor] = {}
        for file in sorted(set(_files_of(source, names, allow_pickle).values())):
            found |= _read(file, names)
        for name in names:
            if name not in found:
                raise KeyError(name)
    except KeyError as error:
        raise ModelError(f"{source}: has no weight {error}; is it of another --family?") from None
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{source}: cannot read its weights ({first[:120]})") from None
    return found


def _files_of(source: str, names: Sequence[str], allow_pickle: bool) -> dict[str, str]:
    """The file that each weight is in; safetensors go before pickles."""
    stems = ["model.safetensors", *(["pytorch_model.bin"] if allow_pickle else [])]
    for stem in stems:
        if index := _file(source, f"{stem}.index.json"):
            with open(index, encoding="utf-8") as opened:  # noqa: PTH123 - a path of the library's
                weights = json.load(opened)["weight_map"]
            files = {name: weights[name] for name in names}
        elif _file(source, stem):
            files = dict.fromkeys(names, stem)
        else:
            continue
        paths = {name: _file(source, file) for name, file in files.items()}
        if lost := next((files[name] for name, path in paths.items() if path is None), None):
            raise ModelError(f"{source}: has no {lost}")
        return {name: str(path) for name, path in paths.items()}
    raise ModelError(f"{source}: has no {' nor '.join(stems)}")


def _read(file: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Those of some weights that a file holds."""
    from safetensors import safe_open

    if file.endswith(".bin"):
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: weights[name] for name in names if name in weights}
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names if name in opened.keys()}  # noqa: SIM118


def _file(source: str, name: str) -> str | None:
    """A file of a folder or of the hub's; None where there is none."""
    from transformers.utils.hub import cached_file

    return cached_file(
        source, name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
