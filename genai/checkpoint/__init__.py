"""Checkpoints: the file format, loading a model from a file, and checkpoints as parts of other models."""

from genai.checkpoint.file import DISK_HINT, FORMAT, folder_of, link, locate, newest, read, save
from genai.checkpoint.load import (
    Loaded,
    build_model,
    explain_errors,
    load,
    load_weights,
    modalities,
    model_conditions,
    weights_of,
)
from genai.checkpoint.part import adopt, adopt_all, digest, fill, pretrained, pretrained_modules, pretrained_nodes
from genai.core.stored import MOVED
