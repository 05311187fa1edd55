"""The command line: overrides in, a checked config out, one sentence and exit code 2 for what the user can mend.

Nothing here imports torch, so that help and mistakes answer at once.
"""

from genai.cli.compose import choices_of, composed, conf_dir, config_folders, new_keys
from genai.cli.entry import arguments, main
from genai.cli.errors import fail, nearest
from genai.cli.overrides import PATHS, parsed_override, quote, quoted
from genai.cli.resume import PLAYERS, check_unchanged, resumed
from genai.cli.sample import with_sampler
from genai.cli.stored import stored_config
from genai.cli.values import apply, apply_all, flat, keys
