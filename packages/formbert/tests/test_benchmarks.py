"""Each benchmark on tiny input: all rivals give the same answers, nothing is timed."""

import pytest


def test_our_answers_are_the_authors(benchmark_file):
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    found = benchmark_file("bench_speed").measure(
        count=24, shape="bert-1x32", tries=1, few=2, exports=("cross, onnx",)
    )  # fmt: skip
    assert found["instances"] == 24
    assert 0 < found["polysemous"] < 24
    equal = found["equal"]
    assert equal["largest difference under authors"] < 1e-4
    assert equal["largest difference"] < 1e-4
    assert equal["answers compared"] >= 20
    assert found["exports"]["cross, onnx"]["agreement"] == 1
    work = found["work"]
    assert work["authors"] == equal["pairs"] * 128
    assert work["authors"] > work["cross"] > work["bi, warm"]
    assert [row["model"] for row in found["tagging"]] == ["cross", "bi"]
    assert all(0 < row["outside, cpu"] < 1 for row in found["tagging"])
    assert found["ratios"][0]["what"] == "cross / authors"


@pytest.mark.realdata
def test_the_benchmark_reads_micls(benchmark_file, data_folder):
    module = benchmark_file("bench_speed")
    inventory, instances = module.questions(data_folder / "micls", 40)
    assert len(instances) == 40
    assert all(one.split == "test" and one.word in inventory for one in instances)
    assert 8 <= sum(len(inventory[one.word]) > 1 for one in instances) <= 28
