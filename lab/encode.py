"""Rows of text to token ids. The ids of a row depend on nothing but that row."""

import re

import numpy as np

from lab.readers import WHITE

END = "<|endoftext|>"
END_ID = 50256
IS_SPACE = np.array([chr(i).isspace() for i in range(0x3002)])  # no later character is one
LONG_RUN = 100_000  # white space that is cut; tiktoken refuses runs of a million


def encode_rows(encoding, rows, separator):
    """Token ids of rows (a list of str), put end to end: (ids uint16, words, bytes).

    Each row is encoded by itself. none: it is stripped. newline: it is kept as it is and ends in
    one newline. endoftext: it is kept as it is, and id 50256 follows, which is no word and no byte.
    Rows that are blank give nothing, and a byte-order mark at a row's start is dropped.
    """
    texts = []
    nbytes = 0
    for row in rows:
        text = row.removeprefix("\ufeff")
        if not text.strip():
            continue
        if separator == "none":
            text = text.strip()
        elif separator == "newline":
            text = text.removesuffix("\n") + "\n"
        texts.append(text)
        nbytes += len(text.encode())
    ids = encode_apart(encoding, texts)
    words = count_words(texts)
    if separator != "endoftext":
        ids = ids[ids != END_ID]
    return ids.astype("<u2"), words, nbytes


def count_words(texts):
    """What str.split finds in texts, in half its time and without the interpreter's lock."""
    characters = np.frombuffer("\n".join(["", *texts]).encode("utf-32-le"), np.uint32)
    space = IS_SPACE[np.minimum(characters, len(IS_SPACE) - 1)]
    return int(np.count_nonzero(space[:-1] > space[1:]))


def encode_apart(encoding, texts):
    """tiktoken's ids (uint32) of each text by itself, with END_ID after each.

    One call for each text would spend a third of the time between calls. So they are joined by the
    token that tiktoken splits at before it looks at anything else, unless one of them spells it.
    """
    if not any(END in text or len(cut_long_runs(text)) > 1 for text in texts):
        joined = "".join(text + END for text in texts)
        return encoding.encode_to_numpy(joined, allowed_special={END})
    ids = [np.empty(0, np.uint32)]
    for text in texts:
        ids += [
            encoding.encode_to_numpy(part, disallowed_special=()) for part in cut_long_runs(text)
        ]
        ids.append(np.array([END_ID], np.uint32))
    return np.concatenate(ids)


def cut_long_runs(text):
    """The text in parts whose ids are those of the whole, none with a long run of white space
    before a word: GPT-2's pattern leaves the last character of such a run to what follows."""
    half = LONG_RUN // 2
    if len(text) < half or not any(text[i : i + half].isspace() for i in range(0, len(text), half)):
        return [text]
    runs = re.finditer(rf"[{WHITE}]{{{half},}}", text)
    cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
