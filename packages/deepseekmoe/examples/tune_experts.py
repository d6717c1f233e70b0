"""Tune the experts that a task uses and nothing else, then answer (ESFT).

python tune_experts.py deepseek-moe-16b-base chats.jsonl runs/esft
"""

import sys
from pathlib import Path

from deepseekmoe import SftConfig, finetune
from deepseekmoe.hub import continue_text
from deepseekmoe.sft import select_for_task
from octavo.rundir import RunDir, options_of


def main(source: str, chats: str, out: Path, epochs: float = 2.0) -> None:
    """Select, tune, ask."""
    selection, experts = select_for_task(source, chats, score="token", p=0.2)
    for layer, chosen in selection.experts.items():
        print(f"layer {layer}: {len(chosen)} of {experts} experts are trained")  # noqa: T201
    file = out.with_name("experts.json")
    selection.save(file)
    config = SftConfig(data=chats, out=out, epochs=epochs, experts=file, learning_rate=1e-4)
    with RunDir.open(out, options_of({"model": source}, config)) as run:
        tuned = finetune(source, config, run)
    print(continue_text(tuned.model, tuned.tokenizer, "What is it?", 20, chat=True))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
