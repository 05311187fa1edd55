"""Other spellings of the values of a few keys, as people type them, and the one that is stored."""

from typing import Any

from genai.core.errors import UserError

PRECISION = {
    **dict.fromkeys(("32", "32.0", "fp32", "float32", "full"), "32-true"),
    **dict.fromkeys(("bf16", "bfloat16", "mixed", "amp"), "bf16-mixed"),
    **dict.fromkeys(("16", "16.0", "fp16", "float16", "half"), "16-mixed"),
}
DEVICE = {"gpu": "cuda", **{f"{i}": f"cuda:{i}" for i in range(16)}}
SPELLINGS = {
    "trainer.precision": PRECISION,
    "precision": PRECISION,
    "trainer.accelerator": {"nvidia": "cuda"},
    "device": DEVICE,
}


def canonical(key: str, value: object) -> Any:
    """The value of a key as it is stored: numbers and other spellings become the name that they stand for.

    Raises UserError for training in fp16, whose loss would have to be scaled.
    """
    if key not in SPELLINGS or isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    typed = str(value).strip().lower()
    found = SPELLINGS[key].get(typed, typed)
    if key == "trainer.precision" and found.startswith("16"):
        raise UserError(
            f"{key}={value} must be one of auto, 32-true, bf16-mixed, bf16-true: fp16 training needs loss "
            "scaling, which is not supported"
        )
    return found
