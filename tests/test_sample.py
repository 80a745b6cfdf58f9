import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_near, near

import sample
from lab.console import UserError
from lab.data import load_tokenizer
from lab.folder import save_checkpoint
from lab.generate import Sampling, choose, generate
from model import LanguageModel
from sample import find_checkpoint


@pytest.fixture
def checkpoint(in_tmp):
    """A random model's best.pt in out/run, with tmp_path as the working directory."""
    torch.manual_seed(0)
    model = LanguageModel(50257, 8, 8, 2, 16, 1)
    (in_tmp / "out/run").mkdir(parents=True)
    save_checkpoint(
        dict(model=model.state_dict(), model_args=model.args, step=7, metrics={"val_ppl": 12.5}),
        "out/run/best.pt",
    )
    return "out/run/best.pt"


def loud(context=8, layers=2, block="gpt2"):
    """A model with large weights, so that what it saw decides what it says."""
    torch.manual_seed(0)
    model = LanguageModel(60, context, 8, 2, 16, layers, block=block).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


# loud()'s logits: in each of two layers eight sums over 8 or 16, then the last norm and the head
LOGITS = near(torch.float32, 2 * 8 * 16 + 2 * 8)


def say(capsys, *words):
    sample.main([*words, "--max_new_tokens", "12", "--device", "cpu"])
    return capsys.readouterr()


# --- the cache, against the whole forward pass


@pytest.mark.arithmetic
@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_cached_logits_are_the_uncached_ones_at_every_position(block, fixed):
    model = loud(block=block)
    tokens = torch.randint(60, (3, 8))
    lengths = [0, 3, 6]
    cache = model.cache(3, fixed)
    model.prefill(
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)],
        cache,
        [0, 1, 2],
    )
    whole = model(tokens)
    for step in range(8):
        at = [min(length + step, 7) for length in lengths]
        x = model.decode(tokens[[0, 1, 2], at], cache)
        for row, length in enumerate(lengths):
            if (
                length + step < 8
            ):  # rows that are full are somebody else's concern, and disturb no other
                assert_near(model.head(x)[row], whole[row, length + step], LOGITS)


@pytest.mark.arithmetic
@torch.no_grad()
@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("context, graph", [(1, False), (2, True), (7, False), (8, True)])
def test_text_past_the_context_is_that_of_the_slow_path(context, graph, block):
    """The slow path does the same without a cache: a full context goes on from its last half."""
    model = loud(context, block=block)
    prompts, how = [[5], [9, 8, 7], list(range(20))], Sampling(1.0, top_k=0, seed=3)
    drawn = list(
        zip(*[ids for ids, _ in generate(model, prompts, 25, how, graph=graph)], strict=True)
    )
    for i, prompt in enumerate(prompts):
        uniform = torch.rand(
            25, dtype=torch.float64, generator=torch.Generator().manual_seed(3 + i)
        )
        seen, out = prompt[-context:], []
        for u in uniform:
            logits = model(torch.tensor([seen]))[:, -1]
            out.append(int(choose(logits, u[None])))
            seen = seen + out[-1:]
            if len(seen) > context:
                seen = seen[-max(1, context // 2) :]
        assert out == list(drawn[i]) and len(set(out)) > 3


@pytest.mark.arithmetic
def test_a_text_does_not_depend_on_those_beside_it():
    model, prompt = loud(), [[1, 2, 3]]
    together = list(
        zip(*[ids for ids, _ in generate(model, prompt * 3, 12, Sampling(seed=5))], strict=True)
    )
    for i in range(3):
        assert [ids[0] for ids, _ in generate(model, prompt, 12, Sampling(seed=5 + i))] == list(
            together[i]
        )
    assert len(set(together)) == 3


@pytest.mark.arithmetic
@torch.no_grad()
def test_logprobs_are_the_model_s_own():
    model = loud()
    steps = list(generate(model, [[1, 2]], 5, Sampling(0.3, 3, repetition_penalty=2.0)))
    tokens = [1, 2] + [ids[0] for ids, _ in steps]
    each = (
        model(torch.tensor([tokens[:-1]]))[0]
        .log_softmax(-1)
        .gather(1, torch.tensor(tokens[1:])[:, None])[1:, 0]
    )
    assert_near(torch.tensor([logprobs[0] for _, logprobs in steps]), each, LOGITS)


# --- choices


def test_choices_keep_to_what_is_allowed():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]).log()
    uniform = torch.linspace(0, 1 - 2**-53, 4000, dtype=torch.float64)

    def drawn(**kwargs):
        return choose(logits.expand(4000, 5), uniform, **kwargs)

    for kwargs in ({}, {"top_k": 99}, {"top_p": 0.9999}):
        counts = drawn(**kwargs).bincount(minlength=5) / 4000
        torch.testing.assert_close(
            counts, logits.exp()[0], atol=2 / 4000, rtol=0
        )  # both ends of its stretch
    for temperature in 0, 1e-9, 5e-324:  # so near 0 that a quotient by it would overflow
        for top_k in 0, 3:
            assert set(drawn(temperature=temperature, top_k=top_k).tolist()) == {1}
    assert set(drawn(top_k=2).tolist()) == {1, 3}
    assert set(drawn(top_p=0.39).tolist()) == {1}
    assert set(drawn(top_p=0.41).tolist()) == {1, 3}
    assert set(drawn(top_p=0.86).tolist()) == {0, 1, 2, 3}
    assert (drawn(temperature=0.5).bincount(minlength=5) / 4000)[1] > 0.5
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(4000, 3)
    assert set(choose(never, uniform).tolist()) == {1}


def test_a_repetition_penalty_keeps_from_what_was_said():
    model = loud()
    plain = [ids[0] for ids, _ in generate(model, [[1]], 30, Sampling(0))]
    careful = [ids[0] for ids, _ in generate(model, [[1]], 30, Sampling(0, repetition_penalty=1e6))]
    assert len(set(careful)) == 30 and 1 not in careful and len(set(plain)) < 30


def test_ids_that_are_no_words_are_never_drawn():
    drawn = [ids for ids, _ in generate(loud(), [[1]] * 20, 30, Sampling(5.0, 0), vocab_size=10)]
    assert max(map(max, drawn)) == 9


# --- the command


def test_text_begins_with_its_start_and_follows_from_the_seed(checkpoint, capsys):
    first = say(capsys, "--start", "The cat sat on the")
    assert (
        first.out.startswith("The cat sat on the")
        and len(first.out) > len("The cat sat on the") + 12
    )
    assert "out/run/best.pt: step 7, validation perplexity 12.50" in first.err
    assert (
        "first token after" in first.err and "tokens/s" in first.err and "tokens/s" not in first.out
    )
    assert say(capsys, "--start", "The cat sat on the").out == first.out
    assert say(capsys, "--start", "The cat sat on the", "--seed", "1").out != first.out
    three = say(capsys, "--start", "The cat sat on the", "--num_samples", "3").out.split("\n---\n")
    assert len(three) == 3 and three[0] == first.out


def test_characters_are_printed_whole(capsys):
    encoding = load_tokenizer()
    printer = sample.Printer(encoding)
    ids = encoding.encode("naïve 日本 🙂")
    assert any(
        b"\xef\xbf\xbd" in encoding.decode([id]).encode() for id in ids
    )  # tokens that end inside one
    shown = []
    for id in ids:
        printer([id])
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == "naïve 日本 🙂" and "\ufffd" not in "".join(shown)


def test_start_from_a_file_and_an_empty_start(checkpoint, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve text", encoding="utf-8")
    assert say(capsys, "--start", "FILE:prompt.txt").out.startswith("naïve text")
    assert say(capsys, "--start", "").out
    assert say(capsys, "--start", "a prompt longer than the model's context " * 9).out.startswith(
        "a prompt longer"
    )
    assert say(capsys, "--top_k", "99999").out
    with pytest.raises(UserError, match="cannot read none.txt"):
        sample.main(["--start", "FILE:none.txt"])


def test_prompts_of_a_file_as_lines_of_json(checkpoint, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("The cat\n\nIn mathematics, one\n", encoding="utf-8")
    lines = say(
        capsys, "--prompts", "prompts.txt", "--num_samples", "2", "--format", "jsonl"
    ).out.splitlines()
    texts = [json.loads(line) for line in lines]
    assert [text["prompt"] for text in texts] == ["The cat"] * 2 + ["In mathematics, one"] * 2
    encoding = load_tokenizer()
    for text in texts:
        assert (
            len(text["tokens"]) == 12
            and encoding.decode(text["tokens"]) == text["text"]
            and text["logprob"] < 0
        )
    alone = say(capsys, "--start", "The cat", "--format", "jsonl").out
    assert json.loads(alone)["text"] == texts[0]["text"]


def test_a_prompt_ends_at_a_line_end_and_nowhere_else(checkpoint, capsys, tmp_path):
    text = "\ufeffone\x0ctwo\u2028three\x85four\rfive\r\nsix\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    lines = say(capsys, "--prompts", "prompts.txt", "--format", "jsonl").out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [
        "one\x0ctwo\u2028three\x85four\rfive",
        "six",
    ]
    assert sample.read_text("prompts.txt") == text.removeprefix("\ufeff").replace("\r\n", "\n")


def test_a_home_is_expanded(checkpoint, script, tmp_path):
    (tmp_path / "prompt.txt").write_text("The cat")
    words = ["--start", "FILE:~/prompt.txt", "--out_dir=~/out/run", "--max_new_tokens", "2"]
    shown = script("sample.py", *words, env={"HOME": str(tmp_path)})
    assert shown.stdout.startswith("The cat")
    for name in "prompts", "checkpoint":
        with pytest.raises(UserError, match=f" {re.escape(str(Path.home()))}/none"):
            sample.main([f"--{name}", "~/none"])


def test_interactive(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nThe dog\n"))
    shown = say(capsys, "--interactive")
    assert (
        shown.out.startswith("The cat") and "\nThe dog" in shown.out and shown.err.count("> ") == 3
    )


def test_a_closed_pipe_is_no_accident(checkpoint):
    command = (
        f"{sys.executable} {ROOT}/sample.py --start x --max_new_tokens 400 --device cpu | head -c 1"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "x" and "Traceback" not in done.stderr and "Error" not in done.stderr


def test_the_run_trained_last_is_found(checkpoint, tmp_path):
    (tmp_path / "out/older").mkdir()
    for name, when in (("older/best.pt", 100), ("run/best.pt", 200)):
        (tmp_path / "out" / name).write_bytes((tmp_path / checkpoint).read_bytes())
        os.utime(tmp_path / "out" / name, (when, when))
    assert str(find_checkpoint()) == checkpoint
    (tmp_path / "out/older/last.pt").write_bytes(
        b""
    )  # its training goes on: now it is the newer, and best.pt its best
    assert str(find_checkpoint()) == "out/older/best.pt"
    assert str(find_checkpoint("out/run")) == checkpoint
    os.remove("out/run/best.pt")
    with pytest.raises(UserError, match="train.py .*config/demo.py`"):
        find_checkpoint("out/run")


def test_mistakes_are_one_line(script, checkpoint, tmp_path):
    assert (
        "temperature must be finite, at least 0"
        in script("sample.py", "--temperature", "-1", code=2).stderr
    )
    (tmp_path / "empty.txt").write_text("\n")
    for words in (
        ["--top_p", "0"],
        ["--top_k", "-1"],
        ["--num_samples", "0"],
        ["--device", "tpu"],
        ["--checkpoint", "none.pt"],
        ["--out_dir", "none"],
        ["--repetition_penalty", "0"],
        ["--seed", "-1"],
        ["--prompts", "empty.txt"],
        ["--prompts", "none.txt"],
        ["--prompts", "x", "--interactive"],
    ):
        with pytest.raises(UserError):
            sample.main(words)
    small = LanguageModel(60, 8, 8, 2, 16, 1)
    save_checkpoint(dict(model=small.state_dict(), model_args=small.args, step=7), checkpoint)
    with pytest.raises(UserError, match="past this model's vocabulary of 60"):
        sample.main(["--start", "The cat sat"])


@torch.no_grad()
def test_a_text_ends_where_the_model_says_so(in_tmp, capsys):
    encoding = load_tokenizer()
    the, cat, sat, on = encoding.encode_ordinary("The cat sat on")
    end, dog = encoding.eot_token, encoding.encode_ordinary("A dog")
    torch.manual_seed(0)
    model = LanguageModel(50257, 16, 8, 2, 16, 1).eval()
    # whatever stands there, position 0 is followed by " cat", 1 by " sat", 2 by the end, and all
    # others by " on"
    embeddings, positions = model.token_embedding.weight, model.position_embedding.weight
    embeddings[[cat, sat, end, on]] = 2 * (torch.eye(8)[:4] - torch.eye(8)[4:])
    positions[:] = 50 * embeddings[[cat, sat, end] + [on] * 13]
    saved = dict(model=model.state_dict(), model_args=model.args, step=7)
    (in_tmp / "prompts.txt").write_text("The\nA dog\n")

    save_checkpoint(saved, "best.pt")  # which knows no such end
    likeliest = ["--checkpoint", "best.pt", "--temperature", "0"]
    shown = say(capsys, *likeliest, "--start", "The").out
    assert shown == "The cat sat<|endoftext|>" + " on" * 9 + "\n"

    save_checkpoint(saved | {"separator": "endoftext"}, "best.pt")
    assert say(capsys, *likeliest, "--start", "The").out == "The cat sat\n"
    assert say(capsys, *likeliest).out == " cat sat\n"  # it begins after the end of another
    many = [*likeliest, "--prompts", "prompts.txt"]
    assert say(capsys, *many).out == "The cat sat\n\n---\nA dog sat\n"
    lines = say(capsys, *many, "--format", "jsonl").out.splitlines()
    texts = [json.loads(line) for line in lines]
    assert [text["text"] for text in texts] == [" cat sat", " sat"]
    assert [text["tokens"] for text in texts] == [[cat, sat], [sat]]
    for prompt, text in zip([[the], dog], texts, strict=True):
        ids = prompt + text["tokens"]
        each = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        logprob = sum(each[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert text["logprob"] == pytest.approx(logprob, rel=near(torch.float32, 50257))
