def test_words(example, tmp_path, capsys):
    example("words").main(tmp_path / "run", 400)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "making", "helped", "wanted", "lion", "unhappiness"
    ]  # fmt: skip
    assert all("syllables, stage" in line for line in lines)


def test_guarantee(example, calibrated, words, capsys):
    example("guarantee").main(calibrated, words / "dev.jsonl", words / "test.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == [
        "3 times faster", "never below 60 %", "harm at most 5 %, surely",
        "as the large one but for 10 %"]  # fmt: skip
    assert sum("with probability 0.9 the" in line for line in lines) == 2


def test_regularize(example, tmp_path, capsys):
    example("regularize").main(tmp_path, 200, 2.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["plain", "regularized"]
    assert all("DIS" in line for line in lines)
