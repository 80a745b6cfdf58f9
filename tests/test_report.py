import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MODERN, RANKS, before_each_pass, make_dataset, metrics, same, weights

import report
import train
from lab import folder, notebook
from lab.console import UserError
from lab.folder import read_lines
from lab.notebook import Run, entry
from report import fit, rows_of

PROMPTS = ["--sample_prompts", "'In mathematics,', 'The cat sat on the'"]
PNG = b"\x89PNG\r\n"


@pytest.fixture
def words(tiny):
    """tiny, with gpt2's whole vocabulary, which a run needs that continues prompts."""
    shutil.rmtree("data/tiny")
    make_dataset(Path("data"), vocab_size=50257)
    return tiny


@pytest.fixture
def trained(words, capsys):
    Path("tiny.py").write_text(
        '"""Tiny: does it learn?\n\nQuestion: a test\'s.\n"""\n' + Path("tiny.py").read_text()
    )
    assert train.main([words, "--expected_ppl", "80,150", "--recorded_ppl", "65.71", *PROMPTS]) == 0
    return capsys.readouterr().out


# --- the entry


def test_a_run_writes_its_own_entry(trained):
    text, evaluations = Path("out/tiny/notebook.md").read_text(), metrics(evaluations=True)
    for phrase in (
        "# Tiny: does it learn? - 20",
        "Question: a test's.",
        "**Parameters: 453,657** (embeddings 402,184,",
        "| train | 3,000 | 1,500 | 9,000 |",
        "Chinchilla's ratio is 20",
        "3,024.4 times over",
        "AdamW, lr 0.01, 5 steps of warm-up",
        "6 x 16 = 96 tokens a step; 63 steps",
        "Validation perplexity 80 to 150",
        "Expected 80 to 150: not met.",
        "earlier result was 65.71",
        "![loss](curve.png)",
        "Finished: 63 of 63 steps",
        'Prompt: "The cat sat on the"',
        "0 steps skipped",
    ):
        assert phrase in text, phrase
    first, last = evaluations[0], evaluations[-1]
    change = f"{last['val_ppl'] - first['val_ppl']:+,.2f}"
    assert f"| {last['val_loss']:.4f} | {last['val_ppl']:,.2f} | {change} |" in text
    assert f"{best(evaluations)['val_ppl']:,.2f} a token" in text
    assert re.search(r"\| val \| [\d.]+ \| [\d.]+ \|", text)  # the last figures
    assert (
        Path("out/tiny/curve.png").read_bytes().startswith(PNG)
        and "torch" in text
        and "commit" in text
    )
    assert [path.name for path in Path("out/tiny").glob(".*")] == [".lock"]


def test_the_entry_names_the_block_and_both_optimizers(tiny):
    assert train.main([tiny, "--max_steps", "6", *MODERN]) == 0
    text = Path("out/tiny/notebook.md").read_text()
    assert (
        "| block | modern |" in text
        and "Muon for the blocks' matrices, lr 0.02, and AdamW, lr 0.01" in text
    )
    assert "then trapezoid to 0" in text


def best(lines):
    return min(lines, key=lambda line: line["val_loss"])


def test_the_entry_is_there_before_the_end_and_after_a_stop(tiny):
    assert (
        train.main([tiny, "--max_steps", "6", "--eval_interval", "3", "--max_hours", "1e-9"]) == 0
    )
    assert "Finished: 1 of 6" in Path("out/tiny/notebook.md").read_text()
    assert (
        train.main(
            [tiny, "--max_steps", "6", "--eval_interval", "3", "--resume", "--log_interval", "4"]
        )
        == 0
    )
    assert [line["step"] for line in metrics(evaluations=True)] == [1, 3, 6]
    assert "Finished: 6 of 6" in Path("out/tiny/notebook.md").read_text()


def test_a_run_whose_run_json_is_gone_ends_all_the_same(tiny):
    with before_each_pass(lambda training: Path("out/tiny/run.json").unlink(missing_ok=True)):
        assert train.main([tiny, "--max_steps", "6"]) == 0
    assert Path("out/tiny/final.json").exists() and not Path("out/tiny/run.json").exists()


@pytest.mark.parametrize(
    "expected, says", [("1,2", "not met"), ("1,1e9", "met"), ("1e8,1e9", "exceeded")]
)
def test_the_end_and_the_entry_say_the_same_of_what_was_expected(tiny, capsys, expected, says):
    assert train.main([tiny, "--max_steps", "6", "--expected_ppl", expected]) == 0
    assert f": {says}\n" in capsys.readouterr().out
    assert f": {says}.\n" in Path("out/tiny/notebook.md").read_text()


def test_looking_changes_nothing(words):
    options = [words, "--max_steps", "20", "--eval_interval", "9"]
    assert train.main([*options, "--out_dir", "out/looked", *PROMPTS]) == 0
    assert train.main([*options, "--out_dir", "out/not"]) == 0
    assert same(weights("out/looked/last.pt"), weights("out/not/last.pt"))
    samples = [line["samples"] for line in metrics("out/looked", evaluations=True) if line["best"]]
    assert all(
        len(texts) == 2 and texts[1][0] == "The cat sat on the" and texts[1][1] for texts in samples
    )
    assert not any("samples" in line for line in metrics("out/not", evaluations=True))


def test_a_tokenizer_that_cannot_be_loaded_costs_the_samples_and_not_the_run(words, script):
    no_folder = {"TIKTOKEN_CACHE_DIR": "/dev/null"}
    done = script("train.py", words, "--max_steps", "6", *PROMPTS, env=no_folder)
    assert "warning: no samples for the notebook: tiktoken cannot load" in done.stderr
    assert (
        Path("out/tiny/final.json").exists()
        and "samples" not in metrics("out/tiny", evaluations=True)[-1]
    )


def add_test_split():
    """Give the data set tiny a test split: its training tokens."""
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    shutil.copy("data/tiny/train.bin", "data/tiny/test.bin")
    meta["splits"]["test"] = meta["splits"]["train"]
    Path("data/tiny/meta.json").write_text(json.dumps(meta))


def test_the_test_split_is_looked_at_once_at_the_end(tiny, capsys):
    add_test_split()
    assert train.main([tiny, "--max_steps", "6"]) == 0
    final = json.loads(Path("out/tiny/final.json").read_text())
    assert (
        final["test"]["tokens"] == 2999
        and f"loss {final['test']['loss']:.4f}" in capsys.readouterr().out
    )
    assert (
        final["val"]["loss"] == best(metrics(evaluations=True))["val_loss"]
    )  # the same weights and batches
    assert train.main([tiny, "--eval_only", "--split", "test"]) == 0
    assert f"loss {final['test']['loss']:.4f}" in capsys.readouterr().out


def test_a_run_killed_before_its_last_figures_makes_up_for_them(tiny, capsys):
    add_test_split()  # validation is known from the evaluation before

    def killed(*words, evaluations):
        """A run that ends as by a kill in the first evaluation after so many."""

        def kill(training):
            if not training and len(metrics(evaluations=True)) == evaluations:
                raise KeyboardInterrupt

        with before_each_pass(kill), pytest.raises(KeyboardInterrupt):
            train.main([tiny, *words])

    killed("--max_steps", "6", evaluations=1)
    assert not Path("out/tiny/final.json").exists()
    assert train.main([tiny, "--max_steps", "6", "--resume"]) == 0
    assert Path("out/tiny/final.json").exists() and "finished" in capsys.readouterr().out
    # extended: it has not ended yet
    killed("--max_steps", "9", "--resume", evaluations=2)
    assert "So far: 9 of 9" in Path("out/tiny/notebook.md").read_text()
    assert train.main([tiny, "--max_steps", "9", "--resume"]) == 0
    assert (
        "Finished: 9 of 9" in Path("out/tiny/notebook.md").read_text()
        and len(metrics(evaluations=True)) == 2
    )


def test_tensorboard_where_there_is_one_and_a_line_where_not(tiny, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert train.main([tiny, "--max_steps", "6", "--tensorboard"]) == 0
    assert "pip install tensorboard" in capsys.readouterr().err

    class Writer:
        seen = []

        def __init__(self, folder):
            assert folder == "out/board"

        def add_scalar(self, name, value, step):
            self.seen.append((name, step))

    monkeypatch.setattr(folder, "board", Writer)
    assert train.main([tiny, "--max_steps", "6", "--tensorboard", "--out_dir", "out/board"]) == 0
    assert {("train_loss", 1), ("val_loss", 6), ("lr", 3)} <= set(Writer.seen)


# --- the report


def made(folder, N, D, loss, **more):
    """A run's folder as train.py leaves it."""
    path = Path(folder)
    path.mkdir(parents=True)
    about = dict(
        name=path.name,
        config={},
        parameters=dict(total=N),
        flops_per_token=6 * N,
        data=dict(splits=dict(val=dict(sha256="one"))),
    )
    (path / "run.json").write_text(json.dumps(about | more))
    line = dict(step=9, tokens=D, elapsed_s=7.2)
    lines = [line | dict(lr=1.0, train_loss=loss, tokens_per_s=50.0)] + [
        line
        | dict(
            val_loss=loss + extra,
            val_ppl=math.exp(loss + extra),
            val_ppl_word=9.0,
            val_bits_per_byte=1.0,
        )
        for extra in (0.5, 0.0, 0.1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_table_sorts_runs_with_the_recorded_ones_among_them(in_tmp, capsys):
    made("out/big", 7_000_000, 10**9, 4.5)
    made("out/small", 1_000_000, 10**9, 6.0)
    made("out/torn", 1, 1, 1.0)
    for spoil, text in (
        ("torn/run.json", '{"name": '),
        ("empty/x", ""),
        ("foreign/metrics.jsonl", "step,loss\n1,2\n"),
        ("half/run.json", "[]"),
    ):
        Path("out", spoil).parent.mkdir(exist_ok=True)
        Path("out", spoil).write_text(text)
    Path("out/file").write_text("no folder")
    with open("out/small/metrics.jsonl", "a") as file:
        file.write('{"step": 10, "val_lo')
    assert report.main([]) is None
    shown = capsys.readouterr().out
    names = re.findall(r"^\| (\w[\w ]*?) \|", shown, re.MULTILINE)
    assert (
        " ".join(names)
        == "run experiment 4 experiment 3 big experiment 2 small experiment 1 experiment 5"
    )
    assert (
        "| big | not finished | 7,000,000 | 1,000,000,000 |" in shown and "No fit: 2 runs" in shown
    )
    assert notebook.show(999_599_112_192) == "1.00e12" and notebook.show(20_333_760) == "20,333,760"
    assert Path("out/report.png").read_bytes().startswith(PNG)
    report.main(["out/big", "--format", "csv", "--picture", "p.png"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert (
        rows[2]["run"] == "big"
        and float(rows[2]["flops"]) == 42e15
        and len(rows) == 6
        and Path("p.png").exists()
    )
    report.main(["--recorded", "no"])
    shown = capsys.readouterr()
    assert "experiment" not in shown.out and "| big |" in shown.out
    assert (
        re.search(r"^left out: .*torn \(no run of this program\)", shown.err)
        and "empty (" in shown.err
    )
    report.main(["out/big"])
    assert "No fit: 1 run on" in capsys.readouterr().out
    report.main(["--format", "json"])
    assert {run["run"] for run in json.loads(capsys.readouterr().out)["runs"]} >= {
        "big",
        "small",
        "experiment 1",
    }
    with pytest.raises(UserError, match="there is no folder out/none"):
        report.main(["out/none"])


@pytest.mark.parametrize(
    "value, text",
    [
        (46.333, "46.33"),
        (70468.84, "70,468.84"),
        (66_113_960_896.71, "6.6e10"),
        (1e6, "1.0e6"),
        (math.exp(700), "1.0e304"),
    ],
)
def test_a_perplexity_is_read_at_a_glance(value, text):
    assert notebook.perplexity(value) == text


def test_the_report_survives_no_runs_at_all(in_tmp, capsys):
    with pytest.raises(UserError, match="no run to show; train one first"):
        report.main(["--recorded", "no"])
    report.main([])
    assert "experiment 1" in capsys.readouterr().out and "nan" not in capsys.readouterr().out


def test_the_fit_finds_the_law_that_made_the_losses(tmp_path):
    def law(N, D):
        return 1.7 + 400 / N**0.34 + 410 / D**0.28

    sizes = [(N, D) for N in (1e6, 3e6, 1e7, 3e7) for D in (1e8, 1e9, 4e9)]
    said = fit(
        rows_of(
            [made(tmp_path / f"{i}", int(N), int(D), law(N, D)) for i, (N, D) in enumerate(sizes)]
        )[0]
    )
    predicted = float(re.search(r"predicts ([\d.]+)", said)[1])
    # neither exponent is on the grid, so that the fit may take the neighbour of the nearest; and
    # the prediction is for twice the size of the largest run
    off = 400 / 6e7**0.34 * 0.03 * math.log(2)
    assert (
        predicted == pytest.approx(law(6e7, 4e9), abs=off + 0.0005)
        and "12 runs with 5 unknowns" in said
    )
    runs = [
        made(tmp_path / f"n{N}", N, 10**8, 2.0 + 300 / N**0.3) for N in (10**6, 3 * 10**6, 10**7)
    ]
    said = fit(rows_of(runs)[0])
    assert "3 runs with 3 unknowns" in said and "a guess" in said
    off = 300 / 2e7**0.3 * 0.005 * math.log(2)  # of a finer grid
    assert float(re.search(r"predicts ([\d.]+)", said)[1]) == pytest.approx(
        2.0 + 300 / 2e7**0.3, abs=off + 0.0005
    )
    rising = [made(tmp_path / f"r{N}", N, 10**8, 2.0 + N / 1e7) for N in (10**6, 3 * 10**6, 10**7)]
    assert "does not fall" in fit(rows_of(rising)[0]) or "L = " in fit(rows_of(rising)[0])


def test_the_report_needs_no_torch(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    script("report.py", env={"PYTHONPATH": str(tmp_path)})


@pytest.mark.slow
def test_two_ranks_write_one_notebook(tiny, script):
    script("train.py", tiny, "--max_steps", "6", launch=RANKS)
    assert (
        len(metrics(evaluations=True)) == 1
        and "2 x cpu" in Path("out/tiny/notebook.md").read_text()
    )
    assert Path("out/tiny/notebook.md").read_text().startswith(entry(Run("out/tiny")))
    assert read_lines("out/none") == [] and np.isfinite(metrics()[-1]["train_loss"])
    assert torch.load("out/tiny/best.pt", weights_only=True)["metrics"]["val_stderr"] > 0
