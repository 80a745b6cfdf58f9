import html
import json
import re
import sys
from pathlib import Path

import pytest

import report
import train
from config import Config
from lab import notebook
from lab.book import headings, new_parser
from lab.console import UserError
from lab.notebook import INVITATION, write_entry

MINE = b"## Conclusion\r\n\r\nIt learns.  \r\n\xff caf\xe9\n\n```\n## Conclusion\n# not closed \t"
ENTRY = "notebook.md"


def leave(name, began="2026-11-01 10:00:00", doc="Does it learn?", samples=()):
    """A run's folder under out/, as train.py leaves it, with its entry. Returns its path."""
    path = Path("out", name)
    path.mkdir(parents=True, exist_ok=True)
    counts = dict(tokens=1000, words=500, bytes=4000, sha256="one")
    about = dict(
        name=name,
        doc=doc,
        began=began,
        config=Config().plain(),
        parameters=dict(total=10, embeddings=6, head_bias=1, blocks=3),
        flops_per_token=60,
        vocab_size=50257,
        steps=9,
        step_tokens=100,
        machine="cpu",
        versions="torch",
        commit="0",
        data=dict(
            source="s", tokenizer="gpt2", separator="none", splits=dict(train=counts, val=counts)
        ),
    )
    line = dict(step=9, epoch=1.0, tokens=900, elapsed_s=7.0, train_loss=2.0, val_loss=2.0)
    line |= dict(val_ppl=7.4, val_ppl_word=9.0, val_bits_per_byte=1.0, samples=samples)
    (path / "run.json").write_text(json.dumps(about))
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_entry(str(path))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return leave("a")


def conclude(path, text=MINE):
    """Write a conclusion where an entry invites one, as a user does."""
    invited = b"## Conclusion\n\n" + INVITATION + b"\n"
    (path / ENTRY).write_bytes((path / ENTRY).read_bytes().replace(invited, text))


def kept(path):
    """What was kept beside an entry, None without it."""
    before = path / "notebook.md.before"
    return before.read_bytes() if before.exists() else None


def test_a_docstrings_arithmetic_is_a_block_of_its_own(run):
    leave("a", doc="Title\n\nQuestion: why?\n    2 x 2 = 4\n    2 + 2 = 4\nExpected: 4")
    block = "Question: why?\n\n    2 x 2 = 4\n    2 + 2 = 4\n\nExpected: 4\n\n## Model"
    assert block in (run / ENTRY).read_text()


# --- what the user writes is theirs


def test_an_entry_invites_a_conclusion(run):
    assert (run / ENTRY).read_bytes().endswith(b" -->\n\n## Conclusion\n\n" + INVITATION + b"\n")
    before = (run / ENTRY).read_bytes()
    write_entry(run)
    assert (run / ENTRY).read_bytes() == before and kept(run) is None


def test_a_conclusion_survives_a_resume_and_an_extension(tiny, capsys):
    steps = [tiny, "--eval_interval", "3", "--max_steps"]
    assert train.main([*steps, "6", "--max_hours", "1e-9"]) == 0
    out = Path("out/tiny")
    conclude(out)
    for options, says in (["6"], "Finished: 6 of 6"), (["9"], "Finished: 9 of 9"):
        assert train.main([*steps, *options, "--resume"]) == 0
        text = (out / ENTRY).read_bytes()
        assert text.endswith(MINE) and says.encode() in text and kept(out) is None
    assert "has no mark" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: re.sub(rb"[ \t]+\n", b"\n", text),
    ],
    ids=["line ends", "byte order mark", "trailing space"],
)
def test_what_an_editor_does_by_itself_is_no_change(run, edit, capsys):
    leave("a", samples=[["a", "trailing \t\nspace "]])
    conclude(run, b"## Conclusion\nmine")
    edited = edit((run / ENTRY).read_bytes())
    (run / ENTRY).write_bytes(edited)
    write_entry(run)
    assert kept(run) is None and not capsys.readouterr().err
    assert (run / ENTRY).read_bytes().endswith(edited[edited.index(b"## Conclusion") :])


def test_an_entry_that_was_changed_above_is_kept_each_time(run, capsys):
    conclude(run)
    versions = []
    for word in (b"Mine", b"My second"):
        versions.append((run / ENTRY).read_bytes().replace(b"Does it", word))
        (run / ENTRY).write_bytes(versions[-1])
        write_entry(run)
        assert kept(run) == b"".join(versions)
        assert (run / ENTRY).read_bytes().endswith(MINE)
        assert capsys.readouterr().err == (
            "warning: out/a/notebook.md was changed above its conclusion, or has no mark; it is "
            "kept in out/a/notebook.md.before\n"
        )
    write_entry(run)
    assert not capsys.readouterr().err


def test_an_entry_without_a_mark_loses_nothing(run, capsys):
    """An earlier version's, or one whose mark the user took out."""
    conclude(run)
    bare = re.sub(rb"<!--.*-->\n", b"", (run / ENTRY).read_bytes())
    (run / ENTRY).write_bytes(bare)
    write_entry(run)
    assert kept(run) == bare and (run / ENTRY).read_bytes().endswith(MINE)
    (run / ENTRY).write_bytes("## Conclusion as UTF-16\n".encode("utf-16"))
    write_entry(run)
    assert kept(run).endswith("as UTF-16\n".encode("utf-16-le"))
    assert (run / ENTRY).read_bytes().endswith(INVITATION + b"\n")


def test_a_sample_is_never_taken_for_the_users_part(run):
    mark = notebook.MARK.format("0" * 64)
    trap = f"```\n## Conclusion\n{mark}\n## Conclusion\n````\n# x\r## Conclusion\n~~~"
    leave("a", samples=[["a", trap], ["b", trap]])
    conclude(run)
    for old, new in (b"", b""), (b"Does it", b"Mine"), (rb"<!-- (?!.*0000).*-->\n", b""):
        (run / ENTRY).write_bytes(re.sub(old, new, (run / ENTRY).read_bytes()))
        write_entry(run)
        text = (run / ENTRY).read_bytes()
        assert text.endswith(MINE) and text.count(MINE) == 1 and text.count(b"sha256") == 3
    blocks = [token.content for token in new_parser().parse(text.decode("latin-1"))]
    assert blocks.count(trap.replace("\r", "\n") + "\n") == 2


def test_a_kill_between_the_two_files_keeps_both(run, monkeypatch):
    conclude(run)
    edited = (run / ENTRY).read_bytes().replace(b"Does it", b"Mine")
    (run / ENTRY).write_bytes(edited)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = notebook.write_whole

        def killed(path, what):
            if str(path).endswith(ENTRY):
                raise KeyboardInterrupt
            write(path, what)

        patch.setattr(notebook, "write_whole", killed)
        write_entry(run)
    assert (run / ENTRY).read_bytes() == edited == kept(run)
    write_entry(run)
    assert kept(run) == edited and (run / ENTRY).read_bytes().endswith(MINE)


# --- the whole notebook


def book(*options):
    """The notebook of all runs, as lines."""
    report.main(["--notebook", "--recorded", "no", *options])
    return Path("out/notebook.md").read_text(encoding="utf-8")


def test_the_runs_stand_in_the_order_in_which_they_began(run):
    leave("z", "2026-11-01 09:59")
    leave("m", "2026-11-01 10:00:01")
    text = book()
    titles = ["All runs", *(f"Does it learn? - 2026-11-01 ({name})" for name in "zam")]
    assert re.findall("^## (.*)$", text, re.MULTILINE) == titles
    assert re.findall(r"^1\. \[(.*)\]", text, re.MULTILINE) == titles
    assert text.index("1. [All") < text.index("| run | state |") < text.index("](report.png)")
    assert "](z/curve.png)" in text and text.count("## Samples") == 0


def test_anchors_are_those_that_github_makes(run):
    text = (
        '# C++ & `a_b` – *"What\'s* new?" Größe हिन्दी x²\n\n# Data\n\n> ## Data\n\nData\n---\n\n# -'
    )
    found = [anchor for _, _, anchor in headings(new_parser().parse(text))]
    assert found == ["c--a_b--whats-new-größe-हिन्दी-x²", "data", "data-1", "data-2", "-"]
    leave("sub/a", doc="Twice [x](y)*z* <b>|\n")
    text = book("out/a", "out/sub/a", "out/sub/a")
    links = re.findall(r"^1\. \[.*\]\(#(.*)\)$", text, re.MULTILINE)
    assert links[-2:] == [f"twice-xz-b---2026-11-01-a{again}" for again in ("", "-1")]
    made = [anchor for _, _, anchor in headings(new_parser().parse(text))]
    assert set(links) < set(made) and len(set(made)) == len(made)


def test_no_part_of_an_entry_leaves_its_section(run):
    conclude(
        run, b"## Conclusion\n\n# Mine\n\nTop\n===\n\n[a](b.txt) ![c](<d e.png>)\n~~~~\n## code"
    )
    leave("b", "2026-11-02", "Q\n\n## Part\n\n```\nnot closed")
    leave("c d\n*e*", "2026-11-03")
    text = book()
    assert [token.tag for token, *_ in headings(new_parser().parse(text))].count("h2") == 4
    for line in ("### Conclusion", "### Mine", "### Top", "## code\n\n~~~~", "### Part"):
        assert f"\n{line}\n" in text, line
    assert "[a](a/b.txt) ![c](<a/d e.png>)" in text and "](c%20d%0A%2Ae%2A/curve.png)" in text
    assert r"2026-11-03 (c d \*e\*)" in text
    assert INVITATION.decode() not in text and "<!--" not in text


def test_the_page_obeys_nothing_in_a_sample_and_loads_nothing(run):
    bad = "<script>alert(1)</script><img src=x onerror=y> </code></pre><b>\n<style>"
    sample = f"```\n{bad}"
    leave(
        "a", doc=f"Q <u>\n\n{bad} [l](javascript:x) ![i](http://x/y.png)", samples=[[bad, sample]]
    )
    conclude(run, f"## Conclusion\n\n<i>{bad} ![p](curve.png) ![t](run.json)".encode())
    book("--html")
    page = Path("out/notebook.html").read_text(encoding="utf-8").partition("</style>")[2]
    names = {"html", "h1", "h2", "h3", "h4", "p", "ol", "ul", "li", "a", "pre", "code", "strong"}
    names |= {"table", "thead", "tbody", "tr", "th", "td", "img"}
    assert set(re.findall(r"<(\w+)", page)) <= names
    images = re.findall(r'<img src="(.*?)"', page)
    assert len(images) == 3 and all(src.startswith("data:image/png;base64,iVBO") for src in images)
    assert not re.search(r'href="(?!#)', page) and html.escape(sample) in page
    for anchor in re.findall('href="#(.*?)"', page):
        assert f'id="{anchor}"' in page


def test_mistakes_are_one_line(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "markdown_it", None)
        with pytest.raises(UserError, match="pip install markdown-it-py"):
            book()
    Path("out/notebook.md").mkdir()
    with pytest.raises(UserError, match="cannot write out/notebook.md: Is a directory"):
        book()
    (run / ENTRY).unlink()
    with pytest.raises(UserError, match="no run has an entry yet"):
        book()
