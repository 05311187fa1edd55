"""Checkpoints: their file, the models it holds, and these as parts of others."""

from genai.checkpoint.file import FORMAT, ROOM, folder_of, link, locate, newest, read, save
from genai.checkpoint.load import Loaded, blamed, build_model, load, load_weights, modalities, told, weights_of
from genai.checkpoint.part import adopt, adopt_all, digest, fill, parts, placed, pretrained
from genai.core.stored import MOVED
