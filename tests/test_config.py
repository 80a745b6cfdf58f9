import dataclasses
from pathlib import Path

import pytest
from helpers import ROOT

from config import Config, load_config
from config.__main__ import page
from lab.console import UserError


def problems(tmp_path, text, *words):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([str(tmp_path / "x.py"), *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_wins_over_the_file_and_takes_both_forms(tmp_path):
    (tmp_path / "exp9.py").write_text(
        'dataset = "demo"\n_side = 3\nd_model = 4 * 8\nlearning_rate = 1\ncompile = True\n'
    )
    words = [
        "--d_model",
        "64",
        "--dropout=0.5",
        "--resume",
        str(tmp_path / "exp9.py"),
        "--compile",
        "False",
        "--expected_ppl",
        "35,42",
        "--dry_run=true",
        "--min_learning_rate",
        "1e-5",
    ]
    config = load_config(words)
    assert (config.dataset, config.d_model, config.dropout, config.learning_rate) == (
        "demo",
        64,
        0.5,
        1,
    )
    assert config.resume is True and config.compile is False and config.dry_run is True
    assert config.expected_ppl == (35, 42) and config.min_learning_rate == 1e-5
    assert config.out_dir == "out/exp9"
    assert (
        load_config(
            [str(tmp_path / "exp9.py"), "--compile", "auto", "--out_dir", "elsewhere"]
        ).out_dir
        == "elsewhere"
    )


def test_everything_wrong_is_listed_at_once_with_the_nearest_name(tmp_path):
    text = (
        'droput = 0.1\nepochs = 1.5\nlr_schedule = "cosin"\nnum_heads = 7\nd_model = 16\n'
        "beta1 = 1.0\nbatch_size = True"
    )
    said = problems(tmp_path, text, "stray", "--warmup_steps", "9", "--max_steps=9", "--seed")
    for phrase in (
        "did you mean dropout?",
        "epochs takes int, not 1.5",
        "did you mean cosine?",
        "beta1 must be",
        "num_heads 7 does not divide",
        "batch_size takes int, not True",
        "stray is neither",
        "warmup_steps 9 leaves nothing",
        "--seed needs a value",
    ):
        assert phrase in said


@pytest.mark.parametrize(
    "text, says",
    [
        ("d_model = ", "SyntaxError"),
        ("d_model = width", "NameError"),
        ("pi = 3", "unknown setting pi"),
        ("learning_rate = float('nan')", "must be finite"),
        ("expected_ppl = (42, 35)", "is (low, high)"),
        ("expected_ppl = ('a', 'b')", "is (low, high)"),
        ("device = 'tpu'", "device is auto"),
        ("device = 'cuda:first'", "device is auto"),
        ("d_model = 0", "at least 1"),
        ("block = 'modern'\nd_model = 24\nnum_heads = 8", "an odd size"),
        ("batch_size = 2\nmicro_batch_size = 3", "larger than batch_size"),
        ("learning_rate = 1e-4\nmin_learning_rate = 1e-3", "is above learning_rate"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, says):
    assert says in problems(tmp_path, text)


def test_values_are_taken_as_they_are_meant(tmp_path):
    (tmp_path / "x.py").write_text(
        "\ufeffimport math\nfrom math import sqrt\nd_model = sqrt(64 * 64)\n"
        "expected_ppl = [35, 42]\ncompile = 1\n"
        "data_dir = '~/data'\nd_ff = int(math.pow(2, 5))\ndef helper(): pass\n",
        encoding="utf-8",
    )
    words = [
        "--max_steps",
        "1e3",
        "--tensorboard",
        "yes",
        "--out_dir=~/out",
        "--sample_prompts",
        "['a', 'b']",
    ]
    config = load_config([str(tmp_path / "x.py"), *words])
    assert (config.d_model, config.d_ff, config.max_steps) == (64, 32, 1000) and isinstance(
        config.d_model, int
    )
    assert (config.compile, config.tensorboard, config.warmup_steps) == (True, True, None)
    assert config.expected_ppl == (35, 42) and config.sample_prompts == ("a", "b")
    assert (config.data_dir, config.out_dir) == (f"{Path.home()}/data", f"{Path.home()}/out")
    for text, value in (("no", False), ("0", False), ("on", True), ("1", True), ("FALSE", False)):
        assert load_config([str(tmp_path / "x.py"), "--resume", text]).resume is value
    assert load_config([str(tmp_path / "x.py"), "--warmup_steps", "None"]).warmup_steps is None
    assert "max_steps takes int, not 10.5" in problems(tmp_path, "", "--max_steps", "10.5")
    assert "resume takes bool, not 2" in problems(tmp_path, "resume = 2")


def test_a_config_runs_in_an_empty_namespace(tmp_path):
    assert "NameError" in problems(tmp_path, "dataset = FIELDS")


def test_no_config_and_no_such_config(tmp_path):
    with pytest.raises(UserError, match="no config given"):
        load_config([])
    with pytest.raises(UserError, match=r"exp5\.py"):
        load_config([str(tmp_path / "exp55.py")])


def test_help_shows_every_setting_with_its_reason(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in shown and field.metadata["help"] in shown


NOTEBOOK = {  # dataset, batch, epochs, learning rate, dropout, recorded
    "exp1": ("wikitext-2", 8, 300, 3e-4, 0.3, 464.64),
    "exp2": ("wikitext-103", 32, 10, 3e-4, 0.3, 364.71),
    "exp3": ("wikitext-103", 32, 20, 6e-4, 0.1, 65.71),
    "exp4": ("wikitext-103", 32, 15, 4e-4, 0.1, 46.33),
    "exp5": ("wikitext-103", 32, 15, 4e-4, 0.1, 0.0),
}


@pytest.mark.parametrize("name", NOTEBOOK)
def test_the_experiments_state_what_the_notebook_states(name):
    c = load_config([str(ROOT / f"config/{name}.py")])
    stated = (c.dataset, c.batch_size, c.epochs, c.learning_rate, c.dropout, c.recorded_ppl)
    assert stated == NOTEBOOK[name]
    assert (c.max_seq_len, c.weight_decay, c.grad_clip) == (512, 0.1, 1.0)
    assert (c.patience, c.max_hours) == ((5, 12.0) if name == "exp5" else (0, 0.0))


def test_the_page_of_settings_is_the_dataclass():
    shown = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert shown == page(), "run: python -m config > docs/settings.md"
    for field in dataclasses.fields(Config):
        assert f"| `{field.name}` | `{field.default!r}` | " in shown, field.name
