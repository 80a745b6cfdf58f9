import io
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import refuse_float64

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


def say(capsys, *words):
    sample.main([*words, "--max_new_tokens", "12", "--device", "cpu"])
    return capsys.readouterr()


# --- the cache, against the whole forward pass


@torch.no_grad()
@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("context, graph", [(1, False), (7, False), (8, True)])
def test_ids_past_the_context_are_those_of_the_slow_path(context, graph, block):
    """The slow path does the same without a cache: a full context goes on from its last half."""
    model, prompts = loud(context, block=block), [[5], [9, 8, 7], list(range(20))]
    texts = Texts(model, 3, SamplingOptions(0.7, 50, 1.0, 2.0, seed=3), graph)
    steps = [*texts.generate(prompts, 25)]
    for row, (prompt, uniform) in enumerate(zip(prompts, draws(3, 25, 3), strict=True)):
        seen, out = prompt[-context:], []
        for u in uniform:
            logits = model(torch.tensor([seen]))[:, -1]
            careful = torch.where(logits > 0, logits / 2, logits * 2)
            said = torch.zeros(1, 60, dtype=torch.bool)
            said[0, prompt + out] = True
            out.append(int(choose(torch.where(said, careful, logits), u[None], 0.7, 50)))
            seen = seen + out[-1:]
            if len(seen) > context:
                seen = seen[-max(1, context // 2) :]
        assert out == [ids[row] for ids in steps] and len(set(out)) > 3


# --- choices


def test_choices_keep_to_what_is_allowed():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]).log()
    uniform = torch.linspace(0, 1, 4000)

    def drawn(**kwargs):
        return choose(logits.expand(4000, 5), uniform, **kwargs)

    for kwargs in {}, {"top_p": 0.9999}:
        counts = drawn(**kwargs).bincount(minlength=5) / 4000
        both_ends = 2 / 4000
        torch.testing.assert_close(counts, logits.exp()[0], atol=both_ends, rtol=0)
    for temperature in 0, 5e-324:  # so near 0 that a quotient by it would overflow
        assert set(drawn(temperature=temperature, top_k=3).tolist()) == {1}
    assert set(drawn(top_k=2).tolist()) == {1, 3}
    for top_p, ids in (5e-324, {1}), (0.39, {1}), (0.41, {1, 3}), (0.86, {0, 1, 2, 3}):
        assert set(drawn(top_p=top_p).tolist()) == ids
    assert (drawn(temperature=0.5).bincount(minlength=5) / 4000)[1] > 0.5
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(4000, 3)
    assert set(choose(never, uniform).tolist()) == {1}


def test_sampling_takes_no_float64():
    with refuse_float64():
        texts = Texts(loud(), 2, SamplingOptions(top_p=0.9))
        assert len([*texts.generate([[1], [2, 3]], 12)]) == 12
    # the numbers are those of float64 nevertheless
    expected = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert torch.equal(draws(2, 9, 5)[1], expected.float())


# --- the command


def test_text_begins_with_its_start_and_follows_from_the_seed(checkpoint, capsys):
    start = "The cat sat on the"
    first = say(capsys, "--start", start)
    assert first.out.startswith(start) and len(first.out) > len(start) + 12
    assert "out/run/best.pt" in first.err
    assert say(capsys, "--start", start).out == first.out
    assert say(capsys, "--start", start, "--seed", "1").out != first.out
    three = say(capsys, "--start", start, "--num_samples", "3").out.split("\n---\n")
    assert len(three) == 3 and three[0] == first.out


def test_characters_are_printed_whole(checkpoint, monkeypatch):
    ids = load_tokenizer().encode("naïve 日本 🙂")
    assert len(ids) > 7  # some tokens end inside a character
    monkeypatch.setattr(Texts, "generate", lambda *_: iter([id] for id in ids))
    out, written = io.StringIO(), []
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(out, "write", written.append)
    sample.main(["--start", "A ", "--device", "cpu"])
    assert "".join(written) == "A naïve 日本 🙂\n" and " 日" in written


def test_prompts_of_a_file_as_lines_of_json(checkpoint, capsys, tmp_path):
    """A prompt ends at a line end and nowhere else."""
    first = "The cat\x0csat\u2028on\x85the\rmat"
    text = f"\ufeff{first}\r\n\nIn mathematics, one\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    words = "--prompts", "prompts.txt", "--num_samples", "2", "--format", "jsonl"
    texts = [json.loads(line) for line in say(capsys, *words).out.split("\n")[:-1]]
    assert [text["prompt"] for text in texts] == [first] * 2 + ["In mathematics, one"] * 2
    for text in texts:
        assert len(text["tokens"]) == 12
        assert load_tokenizer().decode(text["tokens"]) == text["text"]
    alone = say(capsys, "--start", first, "--format", "jsonl").out
    assert json.loads(alone) == texts[0]


def test_interactive(checkpoint, capsys, monkeypatch):
    words = "--repetition_penalty", "2"  # of what is said in that text alone
    cat, dog = (say(capsys, *words, "--start", start).out for start in ("The cat", "The dog"))
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\nThe dog\nThe cat\n"))
    shown = say(capsys, *words, "--interactive")
    assert shown.out == cat + dog + cat


def leave(name, when, bits=None):
    """A run's best.pt under out/, and its final figures if it is finished."""
    path = Path("out", name, "best.pt")
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (when, when))
    if bits:
        figures = {"val": {"bits_per_byte": bits}}
        path.with_name("final.json").write_text(json.dumps(figures))


def test_the_newest_best_pt_is_found_and_a_sweep_s_best(in_tmp):
    with pytest.raises(UserError, match="train.py"):
        find_checkpoint("")
    leave("older", 100)
    leave("run", 200)
    assert find_checkpoint("") == "out/run/best.pt"
    assert find_checkpoint("out/older") == "out/older/best.pt"
    with pytest.raises(UserError, match="out/none.*out/run"):
        find_checkpoint("out/none")
    for when, (name, bits) in enumerate(dict(a=3.0, b=2.5, c=None).items()):
        leave(f"sweep/{name}", when, bits)
    assert find_checkpoint("out/sweep") == "out/sweep/b/best.pt"
    os.remove("out/sweep/b/final.json")  # it is not finished
    assert find_checkpoint("out/sweep") == "out/sweep/a/best.pt"


def test_mistakes_are_named(checkpoint):
    for words, names in (
        ("--top_p -1", "top_p"),
        ("--checkpoint none.pt", "none.pt"),
        ("--prompts ~/none.txt", str(Path.home())),
        ("--prompts x --interactive", "interactive"),
        ("--prompts x --start y", "start"),
        ("--out_dir out --checkpoint x.pt", "checkpoint"),
        ("Hello", '--start "'),
    ):
        with pytest.raises(UserError, match=names):
            sample.main(words.split())


def test_a_model_that_cannot_go_on_is_one_line(checkpoint, capsys):
    save(LanguageModel(60, 8, 8, 2, 16, 1), checkpoint)
    with pytest.raises(UserError, match="vocabulary of 60"):
        sample.main(["--start", "The cat sat"])
    model = LanguageModel(50257, 8, 8, 2, 16, 1)
    model.final_norm.weight.data[3] = torch.nan
    save(model, checkpoint)
    with pytest.raises(UserError, match="not finite"):
        sample.main(["--max_new_tokens", "3"])
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
    lines = say(
        capsys, *likeliest, "--prompts", "prompts.txt", "--format", "jsonl"
    ).out.splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [[cat, sat], [sat]]
