"""Rows of text to token ids. The ids of a row depend on that row alone."""

import re

import numpy as np

END, END_ID = "<|endoftext|>", 50256
LONG_RUN = 50_000  # white space that is cut; tiktoken refuses runs of a million
WHITE = r"[^\S\x1c-\x1f]"  # white space as GPT-2's pattern has it; Python's has four more


def encode_rows(encoding, rows, ends, separator):
    """(ids uint16, {words, bytes, rows}) of a block: rows, and whether the last ends there.

    none: a row is stripped. newline: it is kept as it is and ends in one newline, which counts as a
    word, as the literature counts. endoftext: it is kept as it is, and END_ID follows, which is no
    word and no byte. Rows that are blank give nothing, and a byte-order mark at a row's start is
    dropped.
    """
    texts = [row.removeprefix("\ufeff") for row in rows]
    texts = [text for text in texts if text.strip()]
    if separator == "none":
        texts = [text.strip() for text in texts]
    elif separator == "newline":
        texts = [text.removesuffix("\n") + "\n" for text in texts]
    ids = encode_apart(encoding, texts)
    if separator != "endoftext":
        ids = ids[ids != END_ID]
    elif not ends:
        ids = ids[:-1]
    words = sum(len(text.split()) for text in texts) + len(rows) * (separator == "newline")
    nbytes = sum(len(text.encode()) for text in texts)
    return ids.astype("<u2"), dict(words=words, bytes=nbytes, rows=len(rows) - (not ends))


def encode_apart(encoding, texts):
    """tiktoken's ids (uint32) of each text by itself, with END_ID after each.

    One call for each text would spend a third of the time between calls. So they are joined by the
    token that tiktoken splits at before it looks at anything else, unless one of them spells it.
    """
    joined = "".join(text + END for text in texts)
    long_run = any(joined[i : i + LONG_RUN].isspace() for i in range(0, len(joined), LONG_RUN))
    if joined.count(END) == len(texts) and not long_run:
        return encoding.encode_to_numpy(joined, allowed_special={END})
    ids = [np.empty(0, np.uint32)]
    for text in texts:
        # GPT-2's pattern leaves the last character of white space to the word after it
        runs = re.finditer(rf"{WHITE}{{{LONG_RUN},}}", text)
        cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
        parts = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        ids += [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        ids.append(np.array([END_ID], np.uint32))
    return np.concatenate(ids)
