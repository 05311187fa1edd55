"""The command line: composes a checked config from overrides; a user's mistake ends in one sentence and exit code 2.

Nothing here imports torch, so that help and errors are printed at once.
"""

from genai.cli.compose import compose_config, conf_dir, config_folders, group_choices, new_keys, resolved
from genai.cli.entry import arguments, main
from genai.cli.errors import fail, nearest, one_sentence
from genai.cli.overrides import PATHS, parse_override, quote, quote_override
from genai.cli.resume import OPTIMIZERS, check_unchanged, prepare_training
from genai.cli.sample import prepare_evaluation, prepare_sampling
from genai.cli.stored import stored_config
from genai.cli.values import apply, apply_all, flatten, keys
