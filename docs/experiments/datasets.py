"""The data sets of the runs at real size, out of one data set of articles.

    python prepare.py articles --source DIR --separator none
    python -m docs.experiments.datasets articles

DIR holds the articles as wiki.train.raw and WikiText's validation text as wiki.valid.raw. Of the
training ids the first 105,000,000 are trained on:

- choose: validation is the last 500,000 ids of the articles. Settings are chosen on it.
- wikipedia: validation is WikiText's. Only what was chosen is measured on it.
- wikipedia-2: the same with as many ids of training as WikiText-2 has, for experiment 1.
"""

import codecs
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lab.console import UserError, run
from lab.data import Dataset, load_tokenizer
from lab.folder import write_text, write_whole
from lab.settings import command_line, setting

TEXT = "tokens of English Wikipedia articles, not WikiText-103's own training text"
BLOCK = 1_000_000  # ids that are decoded at a time


@dataclass
class Options:
    """How the articles are cut."""

    train: int = setting(105_000_000, "ids to train on, from the articles' start", low=2)
    small: int = setting(2_347_038, "ids of wikipedia-2's training, from their start", low=2)
    val: int = setting(500_000, "ids of choose's validation, from their end", low=2)
    data_dir: str = setting("data", "where data sets lie", path=True)


def counts_of(ids, encoding):
    """What meta.json says of ids (n,) uint16, by decoding them.

    Between the rows of separator none stands nothing, so that the last word of a row and the first
    of the next count as one. How many rows there were cannot be told.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a block may end amid a character
    words, nbytes = 0, 0
    amid_a_word = False
    for start in range(0, len(ids), BLOCK):
        data = encoding.decode_bytes(ids[start : start + BLOCK].tolist())
        text = decoder.decode(data)
        words += len(text.split())
        words -= amid_a_word and not text[:1].isspace()
        amid_a_word = not text[-1:].isspace()
        nbytes += len(data)
    digest = hashlib.sha256(ids).hexdigest()
    return dict(tokens=len(ids), words=words, bytes=nbytes, rows=None, sha256=digest)


def write(folder, meta, files):
    """Write a data set, files: {split: its ids}."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    for split, ids in files.items():  # stopped midway, meta.json's hashes tell
        write_whole(folder / f"{split}.bin", lambda file, ids=ids: file.write(ids))
    for split, counts in meta["splits"].items():
        print(
            f"{folder}, {split}: {counts['tokens']:,} tokens, {counts['words']:,} words, "
            f"{counts['bytes']:,} bytes"
        )


def main(argv=None):
    usage = "python -m docs.experiments.datasets NAME [--setting value ...]"
    options, words = command_line(Options, argv, usage, words=1)
    if not words or words[0] in ("choose", "wikipedia", "wikipedia-2"):
        raise UserError(f"name the prepared data set of articles: {usage}")
    articles = Dataset(words[0], options.data_dir)
    if articles.separator != "none":
        raise UserError(f"{articles.folder} has separator {articles.separator}, and none is wanted")
    ids = articles.split("train").tokens
    if len(ids) < options.train + options.val:
        raise UserError(
            f"{articles.folder} has {len(ids):,} training tokens, fewer than {options.train:,} to "
            f"train on and {options.val:,} to validate"
        )
    encoding = load_tokenizer()

    def counted(ids):
        return ids, counts_of(ids, encoding)

    whole, small = counted(ids[: options.train]), counted(ids[: options.small])
    end = counted(ids[-options.val :])
    wikitext = articles.split("val").tokens, vars(articles.counts["val"])
    for name, train, val, whose in (
        ("choose", whole, end, "the end of these articles"),
        ("wikipedia", whole, wikitext, "WikiText's"),
        ("wikipedia-2", small, wikitext, "WikiText's"),
    ):
        size = f"{len(train[0]):.2e}".replace("e+0", "e")
        meta = dict(
            tokenizer="gpt2",
            vocab_size=articles.vocab_size,
            separator="none",
            source={"name": f"{size} {TEXT} (validation: {whose})"},
            splits={"train": train[1], "val": val[1]},
        )
        write(Path(options.data_dir, name), meta, {"train": train[0], "val": val[0]})


if __name__ == "__main__":
    run(main)
