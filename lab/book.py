"""The whole notebook: the report and every run's entry, as one Markdown file that GitHub renders,
and as one HTML page that holds its pictures."""

import base64
import itertools
import mimetypes
import os
import re
import unicodedata
from collections import Counter
from urllib.parse import quote, unquote_to_bytes

from lab.console import UserError, progress, python
from lab.folder import read_bytes, write_text
from lab.notebook import HEADING, INVITATION, Run, divide

FOLDER = "out"  # where the notebook goes, and where its links start from
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Notebook</title>
<meta name="viewport" content="width=device-width"><style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif }}
h2 {{ margin-top: 4rem; border-bottom: 1px solid silver }}
table {{ display: block; margin: 1rem 0; overflow-x: auto; font-size: 14px }}
table {{ border-collapse: collapse }}
th, td {{ border: 1px solid silver; padding: 0.1rem 0.5rem }}
pre {{ background: whitesmoke; padding: 0.7rem; white-space: pre-wrap }}
img {{ max-width: 100% }}
</style>{}</html>
"""


def write_book(folders, report, as_html):
    """Write notebook.md and, if `as_html`, notebook.html, with the runs in the order in which they
    began. report: the Markdown on top. Returns the files' paths. Raises UserError."""
    parser = new_parser()
    found = [folder for folder in folders if os.path.exists(f"{folder}/notebook.md")]
    runs = [run for run in map(Run, found) if run.is_ours]
    if not runs:
        raise UserError("no run has an entry yet; train one to its first evaluation")
    runs.sort(key=lambda run: run.about.get("began", ""))
    lines = ["## All runs", "", report, ""]
    for run in progress(len(runs), "notebook", iterable=runs, unit="run"):
        lines += section(run, parser)
    text = with_contents("\n".join(lines), parser)
    pages = {f"{FOLDER}/notebook.md": text}
    if as_html:
        pages[f"{FOLDER}/notebook.html"] = page(text, parser)
    for path, text in pages.items():
        try:
            os.makedirs(FOLDER, exist_ok=True)
            write_text(path, text)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; mend that") from None
    return list(pages)


def new_parser():
    """A parser of Markdown as GitHub's, but that takes HTML as text. Raises UserError."""
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        mend = f"{python()} -m pip install markdown-it-py"
        raise UserError(f"there is no markdown-it-py here, which reads entries; `{mend}`") from None
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


# --- Markdown


def section(run, parser):
    """A run's entry as lines of the notebook; a conclusion only if the user wrote one."""
    parts = divide(read_bytes(f"{run.folder}/notebook.md"))[:2]
    ours, theirs = (b"\n".join(part.splitlines()).decode("utf-8-sig", "replace") for part in parts)
    theirs = theirs.replace(INVITATION.decode(), "").strip()
    heading, _, rest = ours.partition("\n")
    title = words_of(parser.parse(heading)[1]) if heading.startswith("# ") else "Entry"
    lines = [f"## {escaped(title)} ({escaped(run.name)})", *moved(rest, run, parser)]
    if theirs != HEADING.decode():
        lines += moved(theirs, run, parser)
    return lines


def moved(text, run, parser):
    """The lines of an entry's text as they stand in the notebook, where a run is a `##` section:
    headings below that, links from FOLDER, and no code block left open."""
    lines = [*text.split("\n"), "", "end"]
    there = quote(os.fsencode(os.path.relpath(run.folder, FOLDER)))
    tokens = parser.parse("\n".join(lines))
    for i in {i for token in tokens if token.type == "inline" for i in range(*token.map)}:
        lines[i] = re.sub(r"(\]\(<?)(?!(?i:[a-z]+:)|[/#<)])", rf"\1{there}/", lines[i])
    for token in reversed(tokens):  # from the end, since a heading of two lines becomes one
        if token.type == "heading_open" and token.level == 0:
            first, end = token.map
            marks = "#" * min(6, max(3, int(token.tag[1]) + 1))
            words = " ".join(lines[first : end if token.markup[0] == "#" else end - 1])
            lines[first:end] = [re.sub(r"^ *(#+(?=\s|$))?\s*", f"{marks} ", words)]
    lines[-1] = tokens[-1].markup  # of a code block without an end; else nothing
    return lines


def with_contents(text, parser):
    """The notebook's text under a list of its runs."""
    found = headings(parser.parse(text))
    runs = [
        (words, anchor) for token, words, anchor in found if (token.tag, token.level) == ("h2", 0)
    ]
    lines = [f"1. [{escaped(words)}](#{anchor})" for words, anchor in runs]
    return "\n".join(["# Notebook", "", *lines, "", text])


def headings(tokens):
    """[(a heading's token, its words, the anchor that GitHub gives it)]."""
    found, used = [], Counter()
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            words = words_of(inline)
            kept = [c for c in words.lower() if c in " -_" or unicodedata.category(c)[0] in "LMN"]
            anchor = "".join(kept).replace(" ", "-")
            found.append((token, words, f"{anchor}-{used[anchor]}" if used[anchor] else anchor))
            used[anchor] += 1
    return found


def words_of(inline):
    """What a reader sees of a line of Markdown."""
    seen = [child.content for child in inline.children if child.type in ("text", "code_inline")]
    return "".join(seen)


def escaped(text):
    """Text as a line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>&~$#|!])", r"\\\1", " ".join(text.split()))


# --- HTML


def page(text, parser):
    """The notebook as one HTML page. What is HTML in the text is shown and not obeyed."""
    tokens = parser.parse(text)
    for token, _, anchor in headings(tokens):
        token.attrSet("id", anchor)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                put_inside(child)
    return PAGE.format(parser.renderer.render(tokens, parser.options, {}))


def put_inside(image):
    """Make an image hold its file; what is no picture's file here becomes text, so that the page
    loads nothing."""
    source = image.attrs["src"]
    path = os.path.join(FOLDER, os.fsdecode(unquote_to_bytes(source)))
    kind = mimetypes.guess_type(path)[0] or ""
    if kind.startswith("image/") and os.path.isfile(path):
        content = base64.b64encode(read_bytes(path)).decode()
        image.attrs["src"] = f"data:{kind};base64,{content}"
    else:
        image.type, image.content = "text", f"({image.content}: {source})"
