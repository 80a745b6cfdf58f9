import json
import os
from pathlib import Path

import pytest

import train
from lab.console import UserError
from lab.dtype import has_bfloat16
from lab.folder import load

AUTO = ("tiny.py", "--dtype", "auto", "--max_steps", "8")


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16, and float32 it is")
@pytest.mark.parametrize(
    "float32, bfloat16, chosen", [(10, 8, "bfloat16"), (10, 9.5, "float32"), (10, 12, "float32")]
)
def test_the_faster_dtype_is_chosen_and_a_near_tie_is_float32(
    tiny, capsys, float32, bfloat16, chosen
):
    remembered = Path(os.environ["XDG_CACHE_HOME"], "daybook", "dtype.json")
    assert train.main([*AUTO, "--dry_run"]) == 0  # measures, unless another test has
    known = json.loads(remembered.read_text())
    assert known and all(time > 0 for times in known.values() for time in times.values())
    known = {key: dict(float32=float32, bfloat16=bfloat16) for key in known}
    remembered.write_text(json.dumps(known))
    capsys.readouterr()
    assert train.main([*AUTO, "--dry_run"]) == 0
    says = f"1 x cpu, {chosen} (measured: float32 10 ms, bfloat16 {bfloat16:.0f} ms)"
    assert says in capsys.readouterr().out
    remembered.write_text("torn")  # is measured again
    assert train.main([*AUTO, "--dry_run"]) == 0 and json.loads(remembered.read_text())


def test_a_model_larger_than_memory_has_a_plan(tiny, capsys):
    assert train.main([*AUTO, "--d_model", "2000000", "--dry_run"]) == 0
    assert "memory" in capsys.readouterr().out


def test_heads_that_do_not_divide_the_width_are_refused_by_their_own_line(tiny):
    wrong = "--num_heads", "3", "--init_from", "nowhere.pt"
    with pytest.raises(UserError, match="there is no checkpoint nowhere.pt"):
        train.main([*AUTO, *wrong])


def test_a_resumed_run_keeps_its_dtype_unless_another_is_named(tiny, capsys):
    assert train.main([*AUTO[:2], "bfloat16", "--max_steps", "7"]) == 0
    assert load("out/tiny/last.pt")["config"]["dtype"] == "bfloat16"
    assert train.main([*AUTO, "--resume"]) == 0
    assert load("out/tiny/last.pt")["config"]["dtype"] == "bfloat16"
    assert "the matmuls were in" not in capsys.readouterr().out
    assert train.main([*AUTO[:2], "float32", "--max_steps", "9", "--resume"]) == 0
    says = "the matmuls were in bfloat16 until here, and are in float32 from here on"
    assert says in capsys.readouterr().out
    assert json.loads(Path("out/tiny/run.json").read_text())["config"]["dtype"] == "float32"
