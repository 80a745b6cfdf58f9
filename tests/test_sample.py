import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_near, near, refuse_float64

import sample
from lab.console import UserError
from lab.data import load_tokenizer
from lab.folder import save_checkpoint
from lab.generate import SamplingOptions, Texts, choose, draws
from model import LanguageModel
from sample import find_checkpoint


@pytest.fixture
def checkpoint(in_tmp):
    """A random model's best.pt in out/run, with tmp_path as the working directory."""
    torch.manual_seed(0)
    save(LanguageModel(50257, 8, 8, 2, 16, 1), "out/run/best.pt")
    return "out/run/best.pt"


def save(model, path, **more):
    """A model's checkpoint."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figures = dict(step=7, metrics={"val_ppl": 12.5})
    state = dict(model=model.state_dict(), model_args=model.args)
    save_checkpoint(state | figures | more, path)


def loud(context=8, layers=2, block="gpt2"):
    """A model with large weights, so that what it saw decides what it says."""
    torch.manual_seed(0)
    model = LanguageModel(60, context, 8, 2, 16, layers, block=block).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def generated(model, prompts, steps, *options, graph=False, **more):
    """The ids that continue each prompt, a list of lists."""
    texts = Texts(model, len(prompts), SamplingOptions(*options, **more), graph)
    return [
        list(row) for row in zip(*[ids for ids, _ in texts.generate(prompts, steps)], strict=True)
    ]


# loud()'s logits: in each of two layers eight sums over 8 or 16, then the last norm and the head
LOGITS = near(torch.float32, 2 * 8 * 16 + 2 * 8)


def say(capsys, *words):
    sample.main([*words, "--max_new_tokens", "12", "--device", "cpu"])
    return capsys.readouterr()


# --- the cache, against the whole forward pass


@pytest.mark.arithmetic
@torch.no_grad()
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_logprobs_are_those_of_the_whole_forward_pass(block, graph):
    model, prompts = loud(block=block), [[1], [2, 3, 4], [5, 6]]
    texts = Texts(model, 3, SamplingOptions(0.3, 3, repetition_penalty=2.0), graph)
    ids, logprobs = zip(*texts.generate(prompts, 5), strict=True)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt + [step[row] for step in ids])
        each = model(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None])
        drawn = torch.tensor([step[row] for step in logprobs])
        assert_near(drawn, each[-5:, 0], LOGITS)


@pytest.mark.arithmetic
@torch.no_grad()
@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("context, graph", [(1, False), (2, True), (7, False), (8, True)])
def test_text_past_the_context_is_that_of_the_slow_path(context, graph, block):
    """The slow path does the same without a cache: a full context goes on from its last half."""
    model = loud(context, block=block)
    prompts = [[5], [9, 8, 7], list(range(20))]
    rows = generated(model, prompts, 25, 1.0, 0, seed=3, graph=graph)
    for prompt, row, uniform in zip(prompts, rows, draws(3, 25, 3), strict=True):
        seen, out = prompt[-context:], []
        for u in uniform:
            out.append(int(choose(model(torch.tensor([seen]))[:, -1], u[None])))
            seen = seen + out[-1:]
            if len(seen) > context:
                seen = seen[-max(1, context // 2) :]
        assert out == row and len(set(out)) > 3


@pytest.mark.arithmetic
def test_a_text_does_not_depend_on_those_beside_it_or_before_it():
    model, prompt = loud(), [[1, 2, 3]]
    together = generated(model, prompt * 3, 12, seed=5)
    for i in range(3):
        assert generated(model, prompt, 12, seed=5 + i) == together[i : i + 1]
    assert together[0] != together[1] != together[2]
    texts = Texts(model, 1, SamplingOptions(seed=5, repetition_penalty=2.0), graph=True)
    first, _, again = ([ids for ids, _ in texts.generate(p, 12)] for p in (prompt, [[4]], prompt))
    assert first == again


# --- choices


def test_choices_keep_to_what_is_allowed():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]).log()
    uniform = torch.linspace(0, 1, 4000)

    def drawn(**kwargs):
        return choose(logits.expand(4000, 5), uniform, **kwargs)

    for kwargs in ({}, {"top_k": 99}, {"top_p": 0.9999}):
        counts = drawn(**kwargs).bincount(minlength=5) / 4000
        both_ends = 2 / 4000
        torch.testing.assert_close(counts, logits.exp()[0], atol=both_ends, rtol=0)
    for temperature in 0, 1e-9, 5e-324:  # so near 0 that a quotient by it would overflow
        for top_k in 0, 3:
            assert set(drawn(temperature=temperature, top_k=top_k).tolist()) == {1}
    assert set(drawn(top_k=2).tolist()) == {1, 3}
    for top_p in 5e-324, 0.39:
        assert set(drawn(top_p=top_p).tolist()) == {1}
    assert set(drawn(top_p=0.41).tolist()) == {1, 3}
    assert set(drawn(top_p=0.86).tolist()) == {0, 1, 2, 3}
    assert (drawn(temperature=0.5).bincount(minlength=5) / 4000)[1] > 0.5
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(4000, 3)
    assert set(choose(never, uniform).tolist()) == {1}


def test_a_repetition_penalty_keeps_from_what_was_said():
    plain, careful = (generated(loud(), [[1]], 30, 0, 0, 1, penalty)[0] for penalty in (1, 1e5))
    assert len(set(careful)) == 30 and 1 not in careful and len(set(plain)) < 30


def test_sampling_takes_no_float64():
    with refuse_float64():
        with pytest.raises(TypeError, match="float64"):
            torch.ones(1).double()
        assert len(generated(loud(), [[1], [2, 3]], 12, 0.8, 20, 0.9, 1.3)[0]) == 12
    # the numbers are those of float64 nevertheless
    expected = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert torch.equal(draws(2, 9, 5)[1], expected.float())


# --- the command


def test_text_begins_with_its_start_and_follows_from_the_seed(checkpoint, capsys):
    start = "The cat sat on the"
    first = say(capsys, "--start", start)
    assert first.out.startswith(start) and len(first.out) > len(start) + 12
    assert "out/run/best.pt" in first.err and "12.50" in first.err
    assert "tokens per second" in first.err
    assert say(capsys, "--start", start).out == first.out
    assert say(capsys, "--start", start, "--seed", "1").out != first.out
    three = say(capsys, "--start", start, "--num_samples", "3").out.split("\n---\n")
    assert len(three) == 3 and three[0] == first.out


def test_characters_are_printed_whole(checkpoint, monkeypatch):
    ids = load_tokenizer().encode("naïve 日本 🙂")
    assert len(ids) > 7  # some tokens end inside a character
    monkeypatch.setattr(Texts, "generate", lambda *_: iter([[id], [0.0]] for id in ids))
    out, written = io.StringIO(), []
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(out, "write", written.append)
    sample.main(["--start", "A ", "--device", "cpu"])
    assert "".join(written) == "A naïve 日本 🙂\n" and "日" in written


def test_start_from_a_file_and_a_long_start(checkpoint, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve text", encoding="utf-8")
    assert say(capsys, "--start", "FILE:prompt.txt").out.startswith("naïve text")
    long = "longer than the context " * 9
    assert say(capsys, "--start", long, "--top_k", "99999").out.startswith(long)


def test_prompts_of_a_file_as_lines_of_json(checkpoint, capsys, tmp_path):
    """A prompt ends at a line end and nowhere else."""
    first = "The cat\x0csat\u2028on\x85the\rmat"
    text = f"\ufeff{first}\r\n\nIn mathematics, one\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    words = "--prompts", "prompts.txt", "--num_samples", "2", "--format", "jsonl"
    texts = [json.loads(line) for line in say(capsys, *words).out.split("\n")[:-1]]
    assert [text["prompt"] for text in texts] == [first] * 2 + ["In mathematics, one"] * 2
    for text in texts:
        assert len(text["tokens"]) == 12 and text["logprob"] < 0
        assert load_tokenizer().decode(text["tokens"]) == text["text"]
    alone = say(capsys, "--start", first, "--format", "jsonl").out
    assert json.loads(alone) == texts[0] | {"logprob": pytest.approx(texts[0]["logprob"])}


def test_interactive(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nThe dog\n"))
    shown = say(capsys, "--interactive")
    assert shown.out.startswith("The cat") and "\nThe dog" in shown.out
    assert shown.err.count("> ") == 3


def test_a_closed_pipe_is_no_accident(checkpoint):
    words = "--start x --max_new_tokens 400 --device cpu | head -c 1"
    command = f"{sys.executable} {ROOT}/sample.py {words}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "x" and "Traceback" not in done.stderr and "Error" not in done.stderr


def test_the_run_trained_last_is_found(in_tmp):
    for name, when in (("older/best.pt", 100), ("run/best.pt", 200)):
        path = in_tmp / "out" / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (when, when))
    assert str(find_checkpoint()) == "out/run/best.pt"
    # its training goes on: now it is the newer, and best.pt its best
    (in_tmp / "out/older/last.pt").touch()
    assert str(find_checkpoint()) == "out/older/best.pt"
    assert str(find_checkpoint("out/run")) == "out/run/best.pt"
    os.remove("out/run/best.pt")
    with pytest.raises(UserError, match="out/run.*train.py"):
        find_checkpoint("out/run")


def test_a_sweep_s_best_run_is_found(in_tmp):
    for name, bits in (("a", 3.0), ("b", 2.0), ("c", 2.5)):
        folder = in_tmp / "out/sweep" / name
        folder.mkdir(parents=True)
        (folder / "best.pt").touch()
        (folder / "final.json").write_text(json.dumps({"val": {"bits_per_byte": bits}}))
    (in_tmp / "out/sweep/sweep.json").write_text("{}")
    assert str(find_checkpoint("out/sweep")) == "out/sweep/b/best.pt"
    os.remove("out/sweep/b/final.json")  # it is not finished
    assert str(find_checkpoint("out/sweep")) == "out/sweep/c/best.pt"


@pytest.mark.parametrize(
    "words, names",
    [
        ("--temperature 1e308", "temperature"),
        ("--top_p 0", "top_p"),
        ("--max_new_tokens 1000000000000", "max_new_tokens"),
        ("--repetition_penalty 1e-320", "repetition_penalty"),
        ("--checkpoint none.pt", "none.pt"),
        ("--out_dir none", "none"),
        ("--start FILE:~/none.txt", str(Path.home())),
        ("--prompts empty.txt", "empty.txt"),
        ("--prompts x --interactive", "interactive"),
        ("Hello", '--start "'),
    ],
)
def test_mistakes_are_named(checkpoint, words, names):
    Path("empty.txt").write_text("\n")
    with pytest.raises(UserError, match=names):
        sample.main(words.split())


def test_a_model_that_cannot_go_on_is_one_line(checkpoint, capsys):
    save(LanguageModel(60, 8, 8, 2, 16, 1), checkpoint)
    with pytest.raises(UserError, match="vocabulary of 60"):
        sample.main(["--start", "The cat sat"])
    for value in torch.nan, torch.inf:
        model = LanguageModel(50257, 8, 8, 2, 16, 1)
        model.final_norm.weight.data[3] = value
        save(model, checkpoint)
        for words in (), ("--temperature", "0"), ("--top_k", "0"), ("--num_samples", "2"):
            with pytest.raises(UserError, match="not finite"):
                sample.main(["--max_new_tokens", "3", *words])
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_a_text_ends_where_the_model_says_so(in_tmp, capsys):
    encoding = load_tokenizer()
    _, cat, sat, on = encoding.encode_ordinary("The cat sat on")
    end = encoding.eot_token
    torch.manual_seed(0)
    model = LanguageModel(50257, 16, 8, 2, 16, 1).eval()
    # whatever stands there, position 0 is followed by " cat", 1 by " sat", 2 by the end, and all
    # others by " on"
    embeddings, positions = model.token_embedding.weight, model.position_embedding.weight
    embeddings[[cat, sat, end, on]] = 2 * (torch.eye(8)[:4] - torch.eye(8)[4:])
    positions[:] = 50 * embeddings[[cat, sat, end] + [on] * 13]
    save(model, "best.pt")  # which knows no such end
    likeliest = ["--checkpoint", "best.pt", "--temperature", "0"]
    shown = say(capsys, *likeliest, "--start", "The").out
    assert shown == "The cat sat<|endoftext|>" + " on" * 9 + "\n"

    save(model, "best.pt", separator="endoftext")
    assert say(capsys, *likeliest, "--start", "The").out == "The cat sat\n"
    assert say(capsys, *likeliest).out == " cat sat\n"  # it begins after the end of another
    (in_tmp / "prompts.txt").write_text("The\nA dog\n")
    many = [*likeliest, "--prompts", "prompts.txt"]
    assert say(capsys, *many).out == "The cat sat\n\n---\nA dog sat\n"
    lines = say(capsys, *many, "--format", "jsonl").out.splitlines()
    texts = [json.loads(line) for line in lines]
    assert [text["text"] for text in texts] == [" cat sat", " sat"]
    assert [text["tokens"] for text in texts] == [[cat, sat], [sat]]
