"""Text, images and sound as one modality: any of them may be asked for, and any may be given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genai.core.errors import UserError, show
from genai.core.protocols import Batch
from genai.modalities.audio import Audio
from genai.modalities.base import Modality, Request, Shown, Texts, read_each, repeat_strings
from genai.modalities.caption import Caption
from genai.modalities.image import Image

IMAGES = ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"
SOUNDS = ".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"


class Media(Modality):
    """A caption, an image or a waveform; a batch holds one of them, under its own field.

    Args:
        length: bytes of the longest caption.
        words: captions that are given in turn where nothing else is.
        image_shape: shape of an image, [C, H, W].
        audio_shape: shape of a waveform, [1, T].
        sr_hz: sampling rate.
    """

    field, keys, meaning, likelihoods, comparison = "tokens", ("prompt",), "form of its media", (), None

    def __init__(
        self,
        length: int,
        words: Sequence[str],
        image_shape: Sequence[int],
        audio_shape: Sequence[int],
        sr_hz: int,
    ):
        super().__init__()
        if not words or not all(isinstance(word, str) for word in words):
            raise UserError(f"words={show(words)} must be a list of captions")
        self.words = list(words)
        self.caption, self.image, self.audio = Caption(length), Image(), Audio(sr_hz)
        self.image_shape, self.audio_shape = list(image_shape), list(audio_shape)
        self.kinds: tuple[Modality, ...] = (self.caption, self.image, self.audio)

    def state(self) -> dict[str, Any]:
        return {
            "length": self.caption.length,
            "words": self.words,
            "image_shape": self.image_shape,
            "audio_shape": self.audio_shape,
            "sr_hz": self.audio.sr_hz,
        }

    def condition(self, request: Request, n: int) -> Batch:
        """Return the prompts of n samples under the field of their medium; without one, the words in turn.

        A prompt with the suffix of an image or a sound names a file, any other is a caption. Raises UserError for prompts of
        several media, and for a file that cannot be read.
        """
        prompt = request.get("prompt")
        texts = repeat_strings(self.words if prompt is None else prompt, n, "prompt")
        found = {self.kind_of(text) for text in texts}
        if len(found) > 1:
            raise UserError(
                f"prompt={list(dict.fromkeys(texts))} are of several media: give captions, images or sounds in a call, not a mix"
            )
        kind = found.pop()
        if kind is self.image:
            return {
                "image": torch.cat(
                    read_each(texts, n, "prompt", lambda p: self.image.read(p, self.image_shape, "prompt"))
                )
            }
        if kind is self.audio:
            return {
                "audio": torch.cat(
                    read_each(texts, n, "prompt", lambda p: self.audio.read(p, self.audio_shape, "prompt"))
                )
            }
        return {"caption": self.caption.condition({"prompt": texts}, n)["caption"]}

    def kind_of(self, prompt: str) -> Modality:
        """Return the modality that a prompt is of, by the suffix of a file's name."""
        suffix = Path(prompt).suffix.lower()
        return self.image if suffix in IMAGES else self.audio if suffix in SOUNDS else self.caption

    def kind_in(self, batch: Batch) -> Modality | None:
        return next((kind for kind in self.kinds if kind.field in batch), None)

    def in_turn(self, start: int, stop: int) -> Texts:
        """Return the words in turn."""
        return [self.words[i % len(self.words)] for i in range(start, stop)]

    def preview(self, batch: Batch, columns: int | None = None) -> Shown:
        """Return samples for display, as their medium is displayed. Raises UserError for a batch of none of the media."""
        if (kind := self.kind_in(batch)) is None:
            raise UserError(
                f"a batch of media has {', '.join(batch)}, none of {', '.join(k.field for k in self.kinds)}"
            )
        return kind.preview(batch, columns)
