"""A vocabulary of one's own: learned, encoded, damaged, trained on, sampled from."""

import json
import random
import shutil
from pathlib import Path

import pytest
import regex
from helpers import load_tokens
from test_gpt2 import refused
from test_text import jsonl, write

import prepare
import sample
import train
from lab.console import UserError
from lab.data import Dataset
from lab.encode import token_ranks

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # its pattern
TEXTS = [
    "It's the cat's whiskers; the cats' 42 whiskers, 1,234 of them.\n\n  They'll  twitch.\t\n",
    "日本語のテキスト、日本の本。 naïve – Ω 🙂🙂👩‍👩‍👧 Straße\u00a0\u3000 x\u2028y\x1c\x1f z\x00",
    "def f(x):\n\n\n    if x:\r\n\t\treturn  x ** 2  # squares\n        " + "=" * 70 + "\n",
    "a spelled <|endoftext|> is a text like any other \ufffd\ufeff\n" + "ab" * 200,
]


def slow_bpe(text, ranks):
    """The ids of a text: in each piece of GPT-2's pattern, the neighbours of the lowest id join."""
    ids = []
    for piece in regex.findall(GPT2, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joined = [a + b for a, b in zip(parts, parts[1:], strict=False)]
            known = [pair for pair in joined if pair in ranks]
            if not known:
                break
            i = joined.index(min(known, key=ranks.get))
            parts[i : i + 2] = [joined[i]]
        ids += [ranks[part] for part in parts]
    return ids


def noise(seed, length=300):
    """Characters of every kind, and words of TEXTS among them."""
    dice = random.Random(seed)
    kinds = range(32, 127), range(0x20), range(0xA0, 0x250), range(0x4E00, 0x4F00)
    chars = [chr(dice.choice(dice.choice(kinds))) for _ in range(length)]
    return "".join(dice.choice([char, dice.choice(TEXTS)[:9]]) for char in chars)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """data/own in a folder: 50 documents and their own vocabulary of 400."""
    top = tmp_path_factory.mktemp("own")
    rows = [text + noise(i) for i, text in enumerate(TEXTS * 13)]
    write(top, {"rows.jsonl": jsonl(rows)})
    prepare.prepare("own", top / "rows.jsonl", vocab_size=400, data_dir=top / "data")
    return top


def test_the_ids_are_those_of_a_slow_bpe_and_decode_to_the_text(own):
    dataset = Dataset("own", own / "data")
    ranks, encoding = token_ranks(dataset.tokenizer_text), dataset.encoding()
    assert dataset.vocab_size == 400 == len(ranks) + 1 == encoding.n_vocab
    for text in [*TEXTS, *map(noise, range(100, 130)), bytes(range(256)).decode("latin1")]:
        ids = encoding.encode_ordinary(text)
        assert ids == slow_bpe(text, ranks) and encoding.decode(ids) == text
    ids = load_tokens("own", "val", own / "data")
    rows = [json.loads(line)["text"] for line in (own / "rows.jsonl").read_text().splitlines()]
    assert ids.tolist() == sum((slow_bpe(row, ranks) + [399] for row in rows[19::20]), [])
    assert len(ids) < dataset.counts["val"].bytes  # pairs were joined


def test_a_long_training_split_is_learned_from_in_evenly_spread_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.text.BLOCK", 100)
    monkeypatch.setattr(prepare, "LEARN_FROM", 2000)
    seen, learn = [], prepare.learn
    monkeypatch.setattr(
        prepare, "learn", lambda texts, size: learn((seen.append(t) or t for t in texts), size)
    )
    rows = ["ab " * 20] * 100 + ["cd " * 20] * 100 + ["ef " * 20] * 100
    write(tmp_path, {"a/train.txt": "\n".join(rows), "a/val.txt": "xy " * 1000})
    dataset = prepare.prepare("own", tmp_path / "a", vocab_size=300, data_dir=tmp_path / "data")
    tokens = token_ranks(dataset.tokenizer_text)
    assert sum(map(len, seen)) <= 2000
    assert all(word in tokens for word in (b" ab", b" cd", b" ef")) and b" xy" not in tokens


def test_a_million_spaces_and_a_text_too_small(tmp_path, capsys):
    write(tmp_path, {"a/train.txt": "a b" + " " * 1_000_000 + "c", "a/val.txt": "d"})
    dataset = prepare.prepare("own", tmp_path / "a", vocab_size=4096, data_dir=tmp_path / "data")
    assert f"{dataset.vocab_size:,} tokens, not 4,096" in capsys.readouterr().out
    ids = load_tokens("own", "train", tmp_path / "data")[:-1].tolist()
    assert dataset.encoding().decode(ids) == (tmp_path / "a/train.txt").read_text()


def test_a_vocabulary_has_no_end_of_text_where_the_separator_does_not_ask_for_it(tmp_path):
    write(tmp_path, {"a/train.txt": "the cat sat on the mat\n" * 9, "a/val.txt": "the mat\n"})
    for separator in "newline", "none":
        more = dict(vocab_size=270, data_dir=tmp_path / "data")
        dataset = prepare.prepare(separator, tmp_path / "a", separator, **more)
        assert dataset.vocab_size == len(token_ranks(dataset.tokenizer_text))
        assert dataset.split("train").tokens.max() < dataset.vocab_size


def test_a_damaged_vocabulary_is_one_line_with_the_command(own, tmp_path):
    shutil.copytree(own / "data", tmp_path / "data")
    path = tmp_path / "data/own/tokenizer.tiktoken"
    for damage in (lambda: path.write_text(path.read_text()[:-9]), path.unlink):
        damage()
        with pytest.raises(UserError, match="tokenizer.tiktoken.*--vocab_size 400 .*--force"):
            Dataset("own", tmp_path / "data")


def test_wikitext_in_another_vocabulary_is_another_data_set(tmp_path):
    write(tmp_path, {"a/train.txt": "the cat\n" * 9, "a/valid.txt": "the mat\n"})
    more = dict(vocab_size=270, data_dir=tmp_path / "data")
    assert prepare.prepare("wikitext-2", tmp_path / "a", **more).name == "wikitext-2-270"
    assert (
        prepare.prepare("wikitext-2-4096", tmp_path / "a", force=True, **more).name[-4:] == "-270"
    )
    del more["vocab_size"]  # the name says it, where it may be one
    for size in 256, 65537:
        dataset = prepare.prepare(f"wikitext-2-{size}", tmp_path / "a", **more)
        assert (dataset.tokenizer, dataset.separator) == ("gpt2", "endoftext")
    again = prepare.prepare("wikitext-2-270", tmp_path / "a", force=True, **more)
    assert (again.source["vocab_size"], again.separator) == (270, "none")
    (tmp_path / "data/wikitext-2-270/train.bin").write_bytes(b"")
    once = "wikitext-2-270 --data_dir [^ ]+ --separator none --force"
    with pytest.raises(UserError, match=once):
        Dataset("wikitext-2-270", tmp_path / "data").split("train")
    more["vocab_size"] = 50257  # names GPT-2's
    assert prepare.prepare("mine", tmp_path / "a", **more).tokenizer == "gpt2"


# --- a run with it


@pytest.fixture
def trained(own, tiny):
    """out/tiny, trained on data/own, which is gone."""
    shutil.copytree(own / "data/own", "data/own")
    words = "--dataset", "own", "--max_steps", "6", "--head_bias", "False"
    assert train.main([tiny, *words, "--sample_prompts", "('It is',)"]) == 0
    shutil.rmtree("data/own")
    return own


def test_a_checkpoint_carries_its_vocabulary_and_takes_no_other(trained, tiny, capsys):
    capsys.readouterr()
    sample.main(["--start", "日本", "--format", "jsonl", "--device", "cpu"])
    text = json.loads(capsys.readouterr().out)
    encoding = Dataset("own", trained / "data").encoding()
    assert text["text"] == encoding.decode([i for i in text["tokens"] if i < 399])
    line = Path("out/tiny/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["samples"][0][0] == "It is"
    refused("own-.* gpt2", tiny, "--init_from", "out/tiny/best.pt", "--out_dir", "out/b")
    refused("own-.* gpt2", tiny, "--eval_only", "--dataset", "tiny")
