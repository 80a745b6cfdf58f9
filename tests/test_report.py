"""All runs side by side."""

import csv
import io
import json
from pathlib import Path

import pytest
from test_notebook import leave

import report
import train
from lab.console import UserError


def shown(capsys, *words):
    """What report.py prints."""
    capsys.readouterr()
    report.main(list(words))
    return capsys.readouterr().out


def names_in(table):
    """The first column of a Markdown table, or of several."""
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    return [name for name in rows if name != "run" and "---" not in name]


def test_the_table_sorts_runs_and_shows_figures(tiny, capsys):
    for rate in "1e-2", "1e-30":
        words = ["--max_steps", "12", "--learning_rate", rate, "--out_dir", f"out/{rate}"]
        assert train.main([tiny, *words]) == 0
    table = shown(capsys)
    assert names_in(table) == ["1e-2", "1e-30"] and "finished" in table
    rows = list(csv.DictReader(io.StringIO(shown(capsys, "--format", "csv"))))
    assert [row["run"] for row in rows] == ["1e-2", "1e-30"]
    runs = json.loads(shown(capsys, "--format", "json"))["runs"]
    assert float(rows[0]["val_loss"]) == runs[0]["val_loss"] < runs[1]["val_loss"]
    assert runs[0]["tokens"] == 12 * 96 and runs[0]["parameters"] == 5952
    assert Path("out/report.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_compare_stands_apart(in_tmp, capsys):
    leave("a")
    leave("b", sha256="another text")
    leave("w", sha256="WikiText's", tokens=report.WIKITEXT_TOKENS)
    tables = shown(capsys).split("\n\n")
    groups = [names_in(table) for table in tables if table.startswith("|")]
    recorded = ["exp4", "exp3", "exp2", "exp1"]  # the originals stand beside WikiText alone
    assert groups == [["a"], ["b"], ["w", *recorded]]
    assert "7,342,033" in tables[-1] and "65.71" in tables[-1]
    assert "exp3" not in shown(capsys, "--recorded", "no")


def test_runs_are_found_by_links_and_files_are_left_out(in_tmp, capsys):
    leave("a"), leave("group/b")
    Path("elsewhere").mkdir()
    Path("out/group").rename("elsewhere/group")
    Path("out/group").symlink_to("../elsewhere/group")
    Path("elsewhere/group/round").symlink_to("../../out")
    (Path("out") / "note.txt").write_text("no run")
    for words in (), ("out/a", "out/group", "out/note.txt"):
        assert sorted(names_in(shown(capsys, *words))) == ["a", "b"]


def test_a_report_on_some_runs_leaves_the_whole_one_alone(in_tmp, capsys):
    leave("a"), leave("two/b"), leave("two/c")
    report.main(["--notebook"])
    before = Path("out/notebook.md").read_bytes(), Path("out/report.png").read_bytes()
    for words, page in (
        (["out/two"], "out/two/notebook.md"),
        (["out/a"], "out/notebook-a.md"),
        (["out/a", "out/two/b"], "out/notebook-a+b.md"),
    ):
        report.main([*words, "--notebook"])
        assert (
            Path(page).exists() and Path(page.replace("notebook", "report")[:-3] + ".png").exists()
        )
    assert before == (Path("out/notebook.md").read_bytes(), Path("out/report.png").read_bytes())


def test_mistakes_are_one_line(in_tmp, capsys):
    with pytest.raises(UserError, match="demo.py"):
        report.main([])
    with pytest.raises(UserError, match="out/none"):
        report.main(["out/none"])
    leave("a")
    with pytest.raises(UserError, match="--picture"):
        report.main(["--picture", "a.nothing"])
    Path("out/a/metrics.jsonl").unlink()
    with pytest.raises(UserError, match="demo.py"):
        report.main(["out/a"])
    assert "a" in capsys.readouterr().err


def test_the_report_needs_no_torch(in_tmp, script):
    leave("a")
    Path("torch.py").write_text("raise ImportError")
    env = {"PYTHONPATH": str(in_tmp)}
    assert "| a |" in script("report.py", "--notebook", env=env).stdout
