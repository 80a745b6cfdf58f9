"""Text to token ids: the rows of a text, and a vocabulary that is learned from it.

A vocabulary of one's own is a byte-level BPE. Its file, tokenizer.tiktoken, is in tiktoken's
format: a line for each token, its bytes in base64 and its id. The first 256 are the single bytes;
each of the others joins two that come before it.
"""

import base64
import re

import numpy as np

END = "<|endoftext|>"  # a token of its own, the last id
LONG_RUN = 50_000  # white space that is cut; tiktoken and rustbpe refuse runs of a million
WHITE = r"[^\S\x1c-\x1f]"  # white space as GPT-2's pattern has it; Python's has four more


def texts_of(rows, separator):
    """What is encoded of rows, each text by itself. Rows that are blank give nothing, and a
    byte-order mark at a row's start is dropped. See encode_rows()."""
    texts = [row.removeprefix("\ufeff") for row in rows]
    texts = [text for text in texts if text.strip()]
    if separator == "none":
        return [text.strip() for text in texts]
    if separator == "newline":
        return [text.removesuffix("\n") + "\n" for text in texts]
    return texts


def cut(text):
    """A text in parts, cut inside long runs of white space. GPT-2's pattern leaves the last
    character of white space to the word after it."""
    windows = (text[start : start + LONG_RUN] for start in range(0, len(text), LONG_RUN))
    is_long = any(window.isspace() for window in windows)
    runs = re.finditer(rf"{WHITE}{{{LONG_RUN},}}", text) if is_long else ()
    cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


# --- ids


def encode_rows(encoding, rows, ends, separator):
    """(ids uint16, {words, bytes, rows}) of a block: rows, and whether the last ends there. The ids
    of a row depend on that row alone.

    none: it is stripped. newline: it ends in one newline, which counts as a word, as the literature
    counts. endoftext: it is kept as it is; the id of END follows, which is no word and no byte.
    """
    texts = texts_of(rows, separator)
    ids = [np.empty(0, "<u2")]
    for text in texts:
        ids += [encoding.encode_to_numpy(part, disallowed_special=()) for part in cut(text)]
        ids += [[encoding.eot_token]] if separator == "endoftext" else []
    if separator == "endoftext" and not ends:
        ids.pop()
    words = sum(len(text.split()) for text in texts) + len(rows) * (separator == "newline")
    nbytes = sum(len(text.encode()) for text in texts)
    counts = dict(words=words, bytes=nbytes, rows=len(rows) - (not ends))
    return np.concatenate(ids, dtype="<u2", casting="unsafe"), counts


# --- a vocabulary


def learn(texts, size):
    """The file of a vocabulary of at most `size` tokens, without END, as a text: fewer where the
    texts have no more pairs to join. The same texts give the same file on any number of threads,
    since rustbpe joins the most frequent pair first, and of equals the one of the lowest ids."""
    import rustbpe
    from tiktoken_ext.openai_public import r50k_pat_str

    tokenizer = rustbpe.Tokenizer()
    parts = (part for text in texts for part in cut(text))
    tokenizer.train_from_iterator(parts, size, pattern=r50k_pat_str)
    ranks = tokenizer.get_mergeable_ranks()
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)


def token_ranks(text):
    """{a token's bytes: its id} of a vocabulary's file."""
    lines = (line.split() for line in text.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}
