"""Quotes and parses overrides (key=value) as they are typed."""

import re
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from genai.core.errors import UserError
from genai.core.stored import RENAMED_OVERRIDES

# Last parts of keys whose value is a path, and of those whose value is prose: both are taken as they were typed.
PATHS = (
    "run_dir",
    "resume",
    "init_from",
    "ckpt",
    "root",
    "path",
    "file",
    "out",
    "cache",
    "draft",
    "weights",
    "image",
    "audio",
    "mask",
    "autoguidance",
    "scorer",
    "tokenizer",
    "prompt_file",
    "target_path",
    "speech",
)
MEDIA = "image", "audio"  # paths as keys of a script only: in a group they are names of media
PROMPTS = "prompt", "negative_prompt", "stop"  # where even ${ is text, for they are in no stored config
PROSE = *PROMPTS, "label", "name", "project", "notes", "url"
LISTS = "prompt", "negative_prompt", "label", "mask", "stop"


def quote_override(override: str, sweep: bool = False) -> str:
    """Return an override whose value, if it is a path or prose, is in quotes, so that Hydra does not parse its punctuation.

    A value in quotes is left as it is. In a `sweep`, commas separate values, and choice(), shuffle(), sort(), tag() and glob()
    are left as they are.
    """
    override = RENAMED_OVERRIDES.get(override, override)
    key, _, value = override.partition("=")
    last = key.lstrip("+").rpartition(".")[2]
    if last not in PATHS + PROSE or value in ("", "null") or (last in MEDIA and "." in key):
        return override
    literally = last in PROMPTS
    if last in LISTS and re.fullmatch(r"\[.*\]", value, re.DOTALL):
        if last in ("label", "stop"):  # whose strings may hold any character
            value = f"[{','.join(quote(part.strip(), literally) for part in _split_at_commas(value[1:-1]))}]"
        return f"{key}={value}"
    if not sweep:
        return f"{key}={quote(value, literally)}"
    if re.fullmatch(r"(choice|shuffle|sort|tag|glob)\(.*\)", value):
        return override
    return f"{key}={','.join(part if part == 'null' else quote(part, literally) for part in _split_at_commas(value))}"


QUOTED = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""


def _split_at_commas(value: str) -> list[str]:
    """Return the parts of a value between commas that are outside of quotes; none of an empty value."""
    return re.findall(rf"(?:{QUOTED}|[^,])+", value, re.DOTALL)


def quote(value: str, literally: bool = False) -> str:
    """Return a string in quotes, by Hydra's grammar; `literally` also escapes ${. A string in quotes is left as it is."""
    if re.fullmatch(QUOTED, value, re.DOTALL):
        return value
    # A backslash is special before a quote only, and the end of the value is followed by one.
    value = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
    if literally:
        value = value.replace("${", "\\${")
    return f'"{value}"'


def parse_override(override: str) -> Override:
    """Return the parsed override. Raises UserError if it is not key=value or cannot be parsed."""
    if not re.match(r"[^=]+=|~", override):
        raise UserError(f"{override!r} must be key=value, such as max_steps=100 (--help lists all keys)")
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"{override!r} cannot be read: write key=value without spaces around =, and a value with characters other than "
            "letters, digits and -_./ in quotes of its own, 'key=\"value\"'"
        ) from error


def check_empty(override: Override) -> None:
    """Raise UserError for an empty path or name, which would mean the working directory."""
    key = override.key_or_group
    if override.value() == "" and key.rpartition(".")[2] in (*PATHS, "name"):
        raise UserError(f"{key}= is empty: give a value, or null for the default")


def refuse_hydra_keys(overrides: Iterable[str]) -> None:
    """Raise UserError for a key of Hydra itself, which only a sweep reads."""
    for override in overrides:
        if re.match(r"[+~]*hydra[./]", override):
            raise UserError(f"{override} has no effect without -m: leave it out")
