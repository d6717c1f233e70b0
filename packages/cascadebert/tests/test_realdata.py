"""The whole path on real sentences, with encoders from scratch."""

import json

import pytest

pytestmark = pytest.mark.realdata


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("task", "columns", "epochs"),
    [("sst2", ["text_a", None], 2), ("mrpc", ["text_a", "text_b"], 1)],
)
def test_a_cascade_of_real_sentences(data_folder, command, tmp_path, task, columns, epochs):
    names = ["--text-column", columns[0], *(["--pair-column", columns[1]] if columns[1] else [])]
    run = tmp_path / "run"
    code, _, err = command(
        "train", "--model", "scratch:1x32", "--model", "scratch:2x64", "--out", run,
        "--train-data", data_folder / "glue6" / f"{task}.train.jsonl.gz", "--max-length", 48,
        "--learning-rate", "2e-3", "--learning-rate", "1e-3", "--epochs", epochs, "--vocabulary", 4000,
        "--batch-size", 64, *names,
    )  # fmt: skip
    assert code == 0, err
    dev = data_folder / "glue6" / f"{task}.dev.jsonl.gz"
    code, _, err = command("calibrate", "--model", run, "--dev-data", dev, "--target-speedup", 2,
                           *names)  # fmt: skip
    assert code == 0, err
    full = {"sst2": "sst2.validation", "mrpc": "mrpc.test"}[task]
    code, out, err = command("evaluate", "--model", run, "--json", "--test-data",
                             data_folder / "full" / f"{full}.jsonl.gz", *names)  # fmt: skip
    assert code == 0, err
    ((_, rows), *_) = json.loads(out).items()
    small, _, cascade = rows
    floor = {"sst2": 70.0, "mrpc": 62.0}[task]  # the larger class has 50.9 % and 66.5 %
    assert cascade["accuracy %"] > floor
    assert cascade["speed-up (flops)"] == pytest.approx(2, rel=0.25)
    assert small["accuracy %"] > floor - 5


def test_training_rows_of_every_task_are_read(data_folder):
    from cascadebert.config import DataConfig
    from cascadebert.data import label_names, load_examples

    counts = {"mnli": 8999, "qnli": 8999, "qqp": 8999, "mrpc": 3300, "rte": 2240, "sst2": 6227}
    for task, count in counts.items():
        pair = None if task == "sst2" else "text_b"
        config = DataConfig(text_column="text_a", pair_column=pair)
        examples = load_examples(str(data_folder / "glue6" / f"{task}.train.jsonl.gz"), config)
        assert len(examples) == count
        assert (examples.pairs is None) == (pair is None)
        labels = ["0", "1", "2"] if task == "mnli" else ["0", "1"]
        assert label_names(examples, task) == labels


def test_the_generator_spells_with_the_letters_of_real_words(data_folder):
    import gzip
    import re

    from cascadebert.words import generate_words

    with gzip.open(data_folder / "cmudict" / "cmudict.dict.gz", "rt", encoding="utf-8") as file:
        real = {line.split()[0] for line in file}
    real = {word for word in real if re.fullmatch(r"[a-z]{3,13}", word)}
    assert len(real) > 100_000
    words = generate_words(20_000, 0).texts
    in_dictionary = sum(word in real for word in words) / len(words)
    assert 0.01 < in_dictionary < 0.5  # some are English words, most are not
    pairs = {word[i : i + 2] for word in words for i in range(len(word) - 1)}
    real_pairs = {word[i : i + 2] for word in real for i in range(len(word) - 1)}
    assert len(pairs & real_pairs) / len(pairs) > 0.98


def test_the_dictionary_gives_the_words_it_is_known_to_hold(data_folder):
    from collections import Counter

    from cascadebert.words import read_dictionary

    words = read_dictionary(data_folder / "cmudict")
    assert len(words) == 108_409
    counts = Counter(words.labels)
    shares = [round(100 * counts[str(number)] / len(words)) for number in range(1, 6)]
    assert shares == [13, 47, 27, 10, 3]
    known = dict(zip(words.texts, words.labels or [], strict=True))
    assert (known["making"], known["aardvark"]) == ("2", "2")
