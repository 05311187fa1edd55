"""Checkpoints: their file, the models it holds, and these as parts of others."""

from genai.checkpoint.file import FORMAT, ROOM, Damaged, check, link, locate, newest, read, save
from genai.checkpoint.load import (
    Loaded,
    blamed,
    build_model,
    device_of,
    load,
    load_weights,
    modalities,
    nulls,
    packages,
    told,
    weights_of,
)
from genai.checkpoint.part import Part, adopt, digest, fill, parts, placed, pretrained
from genai.core.stored import MOVED
