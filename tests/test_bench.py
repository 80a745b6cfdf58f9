import json
import re

import pytest

import bench


def test_bench_says_how_fast_and_leaves_a_trace(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda machine: 2e9)
    assert bench.main(["tiny.py", "--steps", "4", "--profile", "--dropout", "0"]) == 0
    out = capsys.readouterr().out
    assert "over 4 steps of 6 x 16" in out and "out/tiny/trace.json" in out
    low, median, high = (
        float(re.search(name + r" ([\d,]+)", out)[1].replace(",", ""))
        for name in ("minimum", "median", "maximum")
    )
    assert 0 < low <= median <= high
    flops, mfu = (
        int(re.search(r"= ([\d,]+) FLOPs", out)[1].replace(",", "")),
        float(re.search(r"MFU +(\S+)", out)[1]),
    )
    assert (
        abs(mfu - flops * median / 2e9) < 0.0005 + flops * 0.5 / 2e9
    )  # it and the median were rounded to be shown
    assert json.load(open("out/tiny/trace.json"))["traceEvents"]
    assert len(re.findall(r"^ +\S*aten::\S+", out, re.MULTILINE)) >= 5


def test_the_machine_s_peak_is_in_the_right_order():
    from train import open_machine

    config = bench.load_config(["config/demo.py", "--device", "cpu", "--dtype", "float32"])
    with open_machine(config) as machine:
        assert 1e8 < bench.matmul_peak(machine, seconds=0.1) < 1e14


@pytest.mark.slow
def test_bench_under_torchrun(tiny, script):
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    out = script(
        "bench.py", "tiny.py", "--steps", "2", "--out_dir", "elsewhere", launch=launch
    ).stdout
    assert out.count("tokens/s") == 2 and "tiny on 2 x cpu" in out  # one report, and its MFU line
