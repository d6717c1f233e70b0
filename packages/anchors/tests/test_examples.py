"""Each example runs on a small model and says what it is about."""


def test_see(example, saved, rows, tmp_path, capsys):
    example("see").main(str(saved), str(rows), tmp_path / "flow.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accuracy")
    assert sum("S_wp" in line for line in lines) == 3
    assert "<script>" in (tmp_path / "flow.html").read_text("utf-8")


def test_use(example, saved, rows, tmp_path, capsys):
    example("use").main(str(saved), str(rows), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "tokens kept as" in lines[0]
    before, after = (float(word) for word in lines[3].split()[-3::2])
    assert 0 < after <= before
    assert (tmp_path / "adapter" / "README.md").is_file()
