"""A command of this program with the gpt2 block's residual stream in autocast's dtype.

    python docs/experiments/stream.py train.py config/exp5.py [--setting value ...]
    python docs/experiments/stream.py bench.py config/exp5.py [--setting value ...]

Block modern has it already. This shows what it would give experiments 1 to 5, which get it if the
loss of a whole epoch moves by less than 0.005 nats.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import train
from lab.console import UserError, run
from model import LanguageModel

COMMANDS = {"bench.py": bench, "train.py": train}


class LowStream(torch.nn.Module):
    """A dropout, and then autocast's dtype, which all that is added to the stream has already."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        x, kind = self.dropout(x), x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def main(argv=None):
    script, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if script not in COMMANDS:
        raise UserError(f"name one of {', '.join(COMMANDS)}, not {script!r}")
    initialise = LanguageModel.__init__

    def with_low_stream(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.dropout = LowStream(self.dropout)

    LanguageModel.__init__ = with_low_stream
    try:
        return COMMANDS[script].main(words)
    finally:
        LanguageModel.__init__ = initialise


if __name__ == "__main__":
    run(main)
