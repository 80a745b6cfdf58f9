"""The command line, made from a dataclass: every command's options, their checks and --help."""

import ast
import dataclasses
import difflib
import os
import sys

from lab.console import UserError

WORDS = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
    "none": None, "auto": None,
}  # fmt: skip


def setting(default, help, **more):
    """A dataclass field with its reason and unit, and the values that it allows.

    low, below: low <= value < below. choices: one of them. path: a leading ~ stands for the user's
    home. free: a resumed run may have another value, since the experiment stays what it is. group:
    the heading above it in --help.
    """
    rest = dict(low=None, below=None, choices=None, path=False, free=False, group="")
    return dataclasses.field(default=default, metadata=dict(help=help, **(rest | more)))


def fields_of(cls):
    """{name: field} of a dataclass of settings, or of an instance of it."""
    return {field.name: field for field in dataclasses.fields(cls)}


def types_of(field):
    """The types that a field takes, as a tuple."""
    return getattr(field.type, "__args__", (field.type,))


def from_text(field, text):
    """The value that `text` on the command line means for a field; text that fits none of its types
    is left as it is, for problem_of() to name."""
    types = types_of(field)
    if bool in types or (type(None) in types and text.lower() in ("none", "auto")):
        return WORDS.get(text.lower(), text)
    if types == (str,):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = text
    # one text is a tuple of one
    return (text,) if tuple in types and not isinstance(value, (tuple, list)) else value


def as_meant(field, value):
    """A value as its field holds it: 1e3 for an int, a list for a tuple, 1 for True, ~ for the
    user's home."""
    types = types_of(field)
    if isinstance(value, float) and float not in types and value.is_integer():
        return int(value)
    if isinstance(value, list) and tuple in types:
        return tuple(value)
    if isinstance(value, int) and bool in types and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and field.metadata["path"]:
        return os.path.expanduser(value)
    return value


def did_you_mean(word, known):
    """A hint at the known word that is nearest or that `word` abbreviates, as a phrase in brackets;
    "" if there is none."""
    initials = {"".join(part[0] for part in name.split("_") if part): name for name in known}
    near = difflib.get_close_matches(str(word), known, n=1) or [initials.get(word)]
    return f" (did you mean {near[0]}?)" if near[0] else ""


def problem_of(field, value):
    """What is wrong with one value, as a phrase; "" if nothing is."""
    name, types, about = field.name, types_of(field), field.metadata
    fits = isinstance(value, types) or (float in types and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in types):
        return f"{name} takes {names_of(types)}, not {value!r}"
    if value is None:
        return ""
    if about["choices"] and value not in about["choices"]:
        hint = did_you_mean(value, about["choices"])
        return f"{name} is one of {', '.join(about['choices'])}, not {value!r}{hint}"
    low, below = about["low"], about["below"]
    if low is not None and not low <= value < (below or float("inf")):
        limit = f" and below {below}" if below else ""
        return f"{name} must be finite, at least {low}{limit}, not {value}"
    return ""


def names_of(types):
    """Types as a phrase: int or None."""
    return " or ".join("None" if t is type(None) else t.__name__ for t in types)


def check(cls, values):
    """(an instance of cls from the values that are right, what is wrong with the others as phrases,
    the names that are right). values: {name: value}."""
    problems, right, fields = [], {}, fields_of(cls)
    for name, value in values.items():
        if name not in fields:
            hint = did_you_mean(name, fields) or " (see --help)"
            problems.append(f"unknown setting {name}{hint}")
            continue
        value = as_meant(fields[name], value)
        if problem := problem_of(fields[name], value):
            problems.append(problem)
        else:
            right[name] = value
    return cls(**right), problems, set(right)


def split_words(cls, argv, lists=()):
    """(words that stand by themselves, {name: value}, problems) of a command line for cls. Both
    `--name value` and `--name=value`; a bare --name of type bool is True. A setting of `lists`
    comes as a list: its values have commas between them."""
    fields, alone, values, problems, words = fields_of(cls), [], {}, [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            alone.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        field, follows = fields.get(name), words and not words[0].startswith("--")
        is_bool = field and bool in types_of(field)
        if not equals:
            # a bool may stand bare, so that it takes the next word only if that is a bool's
            if follows and (not is_bool or WORDS.keys() >= set(words[0].lower().split(","))):
                text = words.pop(0)
            elif is_bool:
                text = "True"
            elif field:
                problems.append(f"--{name} needs a value")
                continue
        if field and name in lists:
            values[name] = [from_text(field, part) for part in text.split(",")]
        else:
            values[name] = from_text(field, text) if field else text
    return alone, values, problems


def show_help(cls, usage):
    """Print a command's usage and every setting of cls with its default and reason; exit 0. The
    command's own come first, then a run's by their groups."""
    print(
        f"usage: {usage}\n\nSettings, with their defaults; a bare --setting of type bool is True:"
    )
    fields = fields_of(cls)
    own = [name for name in fields if name in vars(cls).get("__annotations__", {})]
    for name in own + [name for name in fields if name not in own]:
        about = fields[name].metadata
        if about["group"]:
            print(f"\n{about['group']}:\n")
        chosen = f" [{' | '.join(about['choices'])}]" if about["choices"] else ""
        print(f"  --{name} {fields[name].default!r}\n        {about['help']}{chosen}")
    sys.exit(0)


def command_line(cls, argv, usage, words=0):
    """(an instance of cls, the words that stand by themselves) of a script's command line.

    words: how many may stand by themselves, None for any number. An instance of cls may say more in
    problems(), a list of phrases. argv: None for the process's own. Raises UserError with all
    problems in one line; --help prints and exits 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        show_help(cls, usage)
    alone, values, problems = split_words(cls, argv)
    options, wrong, _ = check(cls, values)
    extra = [] if words is None else alone[words:]
    problems += [f"{word} is neither a setting nor its value" for word in extra] + wrong
    if not wrong and hasattr(options, "problems"):
        problems += options.problems()
    if problems:
        raise UserError(f"{'; '.join(problems)}; --help lists the settings")
    return options, alone
