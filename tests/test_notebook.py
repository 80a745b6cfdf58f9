import json
import re
from pathlib import Path

import pytest

import report
import train
from config import Config
from lab.notebook import INVITES, write_entry

MINE = (
    "It learns.\n\n# Next\n\n[a](b.txt) ![c](<d e.png>) [d](https://e.f)\n\n```\n# a comment\n```\n"
)


def leave(name, began="2026-11-01 10:00:00", doc="Does it learn?", samples=(), val=(), **figures):
    """A run's folder under out/, as train.py leaves it. val: what is known of its validation text,
    as pairs. Returns its path."""
    path = Path("out", name)
    path.mkdir(parents=True, exist_ok=True)
    counts = dict(tokens=1000, words=500, bytes=4000, sha256="one")
    metadata = dict(
        name=name,
        doc=doc,
        began=began,
        config=Config(expected_ppl=(1.0, 2.0)).plain(),
        parameters=dict(total=10, embeddings=6, head_bias=1, blocks=3),
        flops_per_token=60,
        vocab_size=50257,
        steps=9,
        step_tokens=100,
        machine="cpu",
        versions="torch",
        commit="0",
        data=dict(
            source="s",
            tokenizer="gpt2",
            separator="none",
            splits=dict(train=counts, val=counts | dict(val)),
        ),
    )
    line = dict(step=9, epoch=1.0, tokens=900, elapsed_s=7.0, train_loss=2.0, val_loss=2.0)
    line |= dict(val_ppl=7.4, val_ppl_word=9.0, val_bits_per_byte=1.0, samples=samples) | figures
    (path / "run.json").write_text(json.dumps(metadata))
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return path


@pytest.fixture
def run(in_tmp):
    path = leave("a")
    write_entry(path)
    return path


def text_of(path):
    """A run's entry without the line that says that it is generated."""
    return (path / "notebook.md").read_text().partition("\n")[2]


def whole():
    """The notebook of all runs, written anew."""
    report.main(["--notebook"])
    return Path("out/notebook.md").read_text()


# --- the entry


SAYS = '"""Tiny: why?\n\nQuestion: how?\nExpected: a loss of 4.\n"""\nmax_steps = 6\n'
EXPECTS = "expected_ppl = (1, 1e9)\n"


@pytest.mark.parametrize(
    "words, title, question, row, expected, judged",
    [
        ("--seed 1", "Tiny: why?", "Question: how?", "| seed | 0 | 1 |", "a loss of 4.", True),
        (
            "--max_steps 7",
            "After tiny.py",
            "> Question: how?",
            "| max_steps | 6 | 7 |",
            "nothing was said",
            False,
        ),
        ("--question Who", "Who", "Who", "Settings as", "Validation perplexity 1 to 1e", True),
    ],
)
def test_an_entry_says_what_was_run(tiny, capsys, words, title, question, row, expected, judged):
    Path(tiny).write_text(SAYS + Path(tiny).read_text() + EXPECTS)
    assert train.main([tiny, *words.split(), "--out_dir", "out/run"]) == 0
    text, shown = text_of(Path("out/run")), capsys.readouterr().out
    assert text.startswith(f"# {title} - ") and f"\n{row}" in text
    assert question in text.partition("## Model")[0].splitlines()
    assert f"## Expected\n\n{expected}" in text
    assert f"train.py tiny.py {words} --out_dir out/run\n" in text
    assert (": met" in text) == (": met" in shown) == judged


# --- what the user writes is theirs


def test_a_conclusion_is_invited_read_and_never_written(tiny):
    steps = [tiny, "--eval_interval", "3", "--max_steps"]
    assert train.main([*steps, "6", "--max_hours", "1e-9"]) == 0
    out = Path("out/tiny")
    assert (out / "conclusion.md").read_text().startswith(INVITES)
    assert "## Conclusion" not in text_of(out)
    with open(out / "conclusion.md", "a") as file:
        file.write("\nMine.\n")
    write_entry(out)
    assert text_of(out).endswith("## Conclusion\n\nMine.\n")
    words = MINE.replace("\n", "\r\n").encode() + b"caf\xe9"
    (out / "conclusion.md").write_bytes(words)
    for options, says in (["6"], "Finished: 6 of 6"), (["9"], "Finished: 9 of 9"):
        assert train.main([*steps, *options, "--resume"]) == 0
        assert (out / "conclusion.md").read_bytes() == words
        assert says in text_of(out) and text_of(out).endswith(f"## Conclusion\n\n{MINE}caf\ufffd\n")
    assert not (out / "notebook.md.before").exists()


def test_an_entry_that_somebody_wrote_in_is_kept_each_time(run, capsys):
    versions = []
    for word in ("Mine", "My second"):
        versions.append((run / "notebook.md").read_text().replace("Does it", word))
        (run / "notebook.md").write_text(versions[-1])
        write_entry(run)
        assert (run / "notebook.md.before").read_text() == "".join(versions)
        assert "out/a/notebook.md.before" in capsys.readouterr().err
    write_entry(run)
    assert "Does it" in text_of(run) and not capsys.readouterr().err


# --- the whole notebook


def test_the_runs_stand_in_the_order_in_which_they_began_with_their_links(run):
    (run / "conclusion.md").write_text(MINE)
    leave("z", "2026-11-01 09:59", "Does *it* learn?", [["p", "```\n# sample\n~~~\n[x](y)"]])
    leave("c d*e*", "2026-11-01 10:00:01")
    text = whole()
    titles = ["Notebook", "All runs", "Does *it* learn? - 2026-11-01 (z)"]
    titles += [f"Does it learn? - 2026-11-01 ({name})" for name in ("a", "c d*e*")]
    anchors = re.findall(r"^1\. \[(.*)\]\(#(.*)\)$", text, re.MULTILINE)
    assert anchors == list(zip(titles[1:], re.findall('<a id="(.*)">', text), strict=True))
    assert all(f"\n# {title}\n" in text for title in titles)
    for line in ("## Conclusion", "# a comment\n```", "# sample", "[x](y)"):
        assert f"\n{line}\n" in text, line
    assert "[a](a/b.txt) ![c](<a/d e.png>) [d](https://e.f)" in text
    assert "](report.png)" in text and "](z/curve.png)" in text
    assert "](c%20d%2Ae%2A/curve.png)" in text


def test_a_notebook_of_some_runs_leaves_the_whole_one_alone(run):
    leave("b")
    leave("two/c")
    before = whole()
    report.main(["out/a", "out/b", "--notebook"])
    assert "(b)" in Path("out/notebook-selected.md").read_text()
    report.main(["out/two", "--notebook"])
    some = Path("out/two/notebook.md").read_text()
    assert "](c/curve.png)" in some and "](report.png)" in some and "(a)" not in some
    assert Path("out/notebook.md").read_text() == before
