"""Sampling from a loaded checkpoint, the same from the command line and from Python."""

import contextlib
import copy
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai import checkpoint, nodes
from genai.build import DATA, MODELS, build_stored
from genai.checkpoint import Loaded
from genai.core import files, rng, stored
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep, check_sampler, with_items

MOST = 10**8  # samples of one call
REQUEST = (
    "guidance",
    "guidance_interval",
    "autoguidance",
    "image",
    "strength",
    "mask",
    "invert",
    "frames",
)  # of a sampler


def sample(
    loaded: Loaded,
    n: int = 16,
    seed: int = 0,
    label: Any = None,
    prompt: Any = None,
    negative_prompt: Any = None,
    stop: str | None = None,
    sampler: dict | None = None,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    image: Any = None,
    mask: Any = None,
    frames: bool = False,
    **arguments: Any,
) -> Batch:
    """n samples; sample i depends on seed + i, its label or prompt, its image and the sampler, and on nothing else.

    Args:
        label: index, name or a list of them; shorter lists repeat. None takes the classes in turn.
        prompt: for models of text, and those that a caption steers, a text or a list of them; shorter lists repeat. None
            begins a text, and leaves the caption out.
        negative_prompt: what guidance leads away from, where a caption steers.
        stop: text of one token at which a sample ends; None: the end of a document, where the model knows ends.
        sampler: a config node, default the one the checkpoint was trained with.
        batch_size: samples made at once.
        on_step: called as on_step(step so far, steps of all batches, state).
        image: to start from, a file or a folder, or (m, C, H, W) in [-1, 1]; fewer than n repeat.
        mask: of the part of the image that is filled in, a file whose white is filled and whose black is kept, or 1 and 0 in
            (1 or C, H, W).
        frames: also return `frames` (k, steps + 1, ...), the states of the first k samples on their way.
        arguments: of the sampler, such as steps, guidance, strength, or autoguidance, a run or checkpoint.

    Returns:
        what the sampler made, on the CPU, with `seeds` (n,) and, for a model of classes, `label` (n,).
    """
    if not isinstance(loaded, Loaded):
        raise UserError(
            f"{loaded!r} is no loaded model: sample(load({str(loaded)!r})) samples from a run or checkpoint"
        )
    at_least(n, 1, "n")
    if n > MOST:
        raise UserError(f"n={n} is more samples than one call can hold: give at most {MOST}")
    at_least(batch_size, 1, "batch_size")
    at_least(seed, 0, "seed")
    if sampler is not None and not isinstance(sampler, dict):
        raise UserError(
            f"sampler={sampler!r} must be a config node such as those in conf/sampler: a dict with _target_"
        )
    seeds = rng.seed_range(seed, n)
    with checkpoint.blamed(loaded):
        wanted = {"image": image, "mask": mask, "frames": frames or None}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        run = bind(loaded, sampler or loaded.config["sampler"], arguments, list(wanted))
        captions = resolve_captions(prompt, negative_prompt, n, loaded)
        labels = None if captions and label is None else resolve_labels(label, n, loaded)  # a caption says enough
        cond = resolve_prompts(None if captions else prompt, stop, n, loaded) or {}
        cond |= (captions or {}) | ({} if labels is None else {"label": labels})
        pictures = resolve_images(image, mask, n, loaded)
        chunks, starts = [], range(0, n, batch_size)
        for k, start in enumerate(starts):
            part = slice(start, start + batch_size)
            progress = None if on_step is None else _shifted(on_step, k, len(starts))
            given = {name: value[part] for name, value in cond.items()}
            special = {name: value[part] for name, value in pictures.items()} | (
                {"frames": True} if frames and k == 0 else {}
            )
            with loaded.computing():
                chunks.append(run(loaded.model, seeds[part], given or None, progress, **special))
        batch = {name: torch.cat([chunk[name].cpu() for chunk in chunks if name in chunk]) for name in chunks[0]}
        if "pixels" in loaded.assets:
            from genai.data.pixels import to_images

            batch["image"] = to_images(batch["tokens"], **loaded.assets["pixels"])
    return {**batch, "seeds": seeds, **({} if labels is None else {"label": labels})}


def _shifted(on_step: OnStep, k: int, chunks: int) -> OnStep:
    return lambda i, steps, state: on_step(k * steps + i, chunks * steps, state)


def bind(loaded: Loaded, node: dict, arguments: dict[str, Any], wanted: Sequence[str] = ()) -> Callable[..., Batch]:
    """The sampler of a config node, also of an older one, with arguments of its own, or of a part of it, changed; it must take
    those in `wanted` too.

    Raises UserError for one that it lacks.
    """
    node = copy.deepcopy(stored.up_to_date(node))
    made = build_stored(node, loaded.trust)
    own, more = nodes.arguments(node), inspect.signature(made).parameters.values()
    own = {**own, **{p.name: p.name for p in more if p.kind is p.KEYWORD_ONLY and p.name not in own}}
    for key in [*arguments, *wanted]:
        if key not in own:
            raise UserError(f"the sampler {nodes.name_of(node)} has no {key}; it has {', '.join(own)}")
    for key, value in arguments.items():
        *parts, last = own[key].split(".")
        functools.reduce(lambda at, part: at[part], parts, node)[last] = value
    others = {key: node.pop(key) for key in ("draft", "autoguidance") if isinstance(node.get(key), str)}
    extras = {key: _other(loaded, key, path).model for key, path in others.items()}
    run = with_items(functools.partial(build_stored(node, loaded.trust), **extras), items_of(loaded))
    try:
        inspect.signature(run).bind(None, None, None, None)
    except TypeError as error:
        raise UserError(f"the sampler {node['_target_']} cannot be called: {error}") from error
    check_sampler(run, loaded.model)
    return run


def _other(loaded: Loaded, key: str, path: str) -> Loaded:
    """Another model that a sampler calls. Raises UserError unless it is told the same words."""
    other = checkpoint.load(path, device=str(loaded.device), trust=loaded.trust, precision=loaded.precision)
    for asset, what in (("tokenizer", "tokenizer"), ("class_names", "classes")):
        if other.assets.get(asset) != loaded.assets.get(asset):
            raise UserError(f"{key}={other.path} has another {what} than {loaded.path}: they must share one")
    return other


def resolve_images(image: Any, mask: Any, n: int, loaded: Loaded) -> Batch:
    """The images that n samples start from (n, C, H, W), and how much of them to keep, on the CPU; empty where there are none."""
    from genai.data import io

    shape, found = getattr(loaded.model, "data_shape", ()), {}
    if image is not None:
        images = image if isinstance(image, Tensor) else io.read_images(Path(image), shape, "image")
        found["image"] = images.repeat(-(-n // len(images)), *[1] * (images.ndim - 1))[:n]
    if mask is not None:
        white = mask if isinstance(mask, Tensor) else (io.read_images(Path(mask), [1, *shape[1:]], "mask")[:1] + 1) / 2
        found["mask"] = (1 - white).expand(n, *white.shape[-len(shape) :])
    return found


def items_of(loaded: Loaded) -> Callable[[str, Tensor], Tensor]:
    """Items of the data a checkpoint was trained on, which is built when first asked."""
    data = functools.cache(lambda: build_stored(loaded.config["data"], loaded.trust, (MODELS, DATA)))
    return lambda split, index: data().items(split, index)


def resolve_prompts(prompt: Any, stop: str | None, n: int, loaded: Loaded) -> Batch | None:
    """Conditions of n texts, None for a model of something else. Raises UserError if that was given a prompt."""
    from genai.data import text

    if "tokenizer" not in loaded.assets:
        for key, value in (("prompt", prompt), ("stop", stop)):
            if value is not None:
                raise UserError(f"{key}={value!r} was given, but this model takes no text: leave {key}= out")
        return None
    tokenizer = text.from_state(loaded.assets["tokenizer"])
    cond = text.prompts(tokenizer, _repeated("" if prompt is None else prompt, n, "prompt"))
    if stop is not None:
        if not isinstance(stop, str | int | float):
            raise UserError(f"stop={stop} must be one text of one token")
        ids = tokenizer.encode(str(stop))
        if len(ids) != 1:
            raise UserError(f"stop={stop!r} is {len(ids)} tokens of this model's tokenizer: give a text that is one")
        cond["stop"] = torch.full((n,), int(ids[0]))
    return cond


def resolve_captions(prompt: Any, negative_prompt: Any, n: int, loaded: Loaded) -> Batch | None:
    """The captions n samples are steered by; None where no prompt was given, or the model writes text itself.

    Raises UserError if the model takes no captions, or not as long ones.
    """
    from genai.data.captions import encode

    null = loaded.model.null().get("caption") if hasattr(loaded.model, "null") else None  # type: ignore[operator]
    if negative_prompt is not None and (null is None or prompt is None):
        why = "this model takes no prompt" if null is None else "there is no prompt= to guide towards"
        raise UserError(f"negative_prompt={negative_prompt!r} was given, but {why}: leave negative_prompt= out")
    if null is None or prompt is None:
        return None
    given = {"caption": ("prompt", prompt), "negative": ("negative_prompt", negative_prompt)}
    return {
        name: encode(_repeated(text, n, key), len(null), "data.length of this model")
        for name, (key, text) in given.items() if text is not None
    }  # fmt: skip


def _repeated(text: Any, n: int, key: str) -> list[str]:
    texts = [str(t) for t in (text if isinstance(text, list | tuple) else [text])]
    if not texts:
        raise UserError(f"{key}=[] is empty: leave it out, or give a text")
    return (texts * -(-n // len(texts)))[:n]


def resolve_labels(label: Any, n: int, loaded: Loaded) -> Tensor | None:
    """Indices (n,) of the labels asked for, None for an unconditional model. Raises UserError for one it lacks."""
    names = loaded.assets.get("class_names")
    classes = loaded.config["model"].get("classes")
    if classes is None:
        if label is not None:
            raise UserError(f"label={label} was given, but this model is unconditional: leave label= out")
        return None
    if label is None:
        return torch.arange(n) % classes
    wanted = list(label) if isinstance(label, list | tuple) else [label]
    if not wanted:
        raise UserError("label=[] is empty: leave label= out for every class in turn")
    indices = torch.tensor([_index(value, names, classes) for value in wanted])
    return indices.repeat(-(-n // len(indices)))[:n]


def _index(value: Any, names: list[str] | None, classes: int) -> int:
    if names and not isinstance(value, bool) and str(value) in names:
        return names.index(str(value))
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < classes:
        return value
    shown = f", or one of {', '.join(names[:20])}" if names else ""
    raise UserError(f"label={value} is not a class of this model: give an index from 0 to {classes - 1}{shown}")


def run(cfg: Any) -> Path:
    """`sample.py`: load, sample with a progress bar or while the text appears, write files; returns their folder."""
    from omegaconf import OmegaConf

    if cfg.out is not None:
        files.check_folder(Path(cfg.out), "out")
    loaded = checkpoint.load(cfg.ckpt, cfg.weights, cfg.device, cfg.trust, cfg.precision, cfg.compile)
    node: dict[str, Any] = OmegaConf.to_container(cfg.sampler, resolve=True)  # type: ignore[assignment]
    request: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(REQUEST)))
    request = {key: value for key, value in request.items() if value is not None and value is not False}
    stop = unescaped(cfg.stop)
    given = cfg.label, cfg.prompt, cfg.negative_prompt
    label, prompt, negative_prompt = (OmegaConf.to_container(v) if OmegaConf.is_list(v) else v for v in given)
    is_text = "tokenizer" in loaded.assets
    with streamed(loaded, prompt, stop) if is_text else bar() as on_step:
        batch = sample(
            loaded, cfg.n, cfg.seed, label, prompt, negative_prompt, stop, node, cfg.batch_size, on_step, **request
        )
    home = loaded.path.parent.parent if loaded.path.parent.name == "checkpoints" else loaded.path.parent
    out = Path(cfg.out) if cfg.out is not None else _unused(home)
    with files.writable(out, "name another folder with out="):
        files.make_folder(out, None if cfg.out is not None else home)
        written = _write(out, cfg, loaded, batch, prompt, node)
    print(f"{cfg.n} samples of {loaded.path} (step {loaded.step}, {cfg.weights} weights): {written}")
    return out


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(stop: Any) -> Any:
    r"""What was typed, with a line break for \n, a tab for \t, a carriage return for \r and one backslash for two: a shell passes
    these on as they are."""
    return re.sub(r"\\([ntr\\])", lambda m: ESCAPES[m[1]], stop) if isinstance(stop, str) else stop


def _write(out: Path, cfg: Any, loaded: Loaded, batch: Batch, prompt: Any, node: dict[str, Any]) -> str:
    """Files of the samples, to a folder that is there; returns their names."""
    from genai.data import captions, io, text

    if "tokenizer" in loaded.assets:
        given = resolve_prompts(prompt, None, cfg.n, loaded) or {}
        text.write_samples(out, text.from_state(loaded.assets["tokenizer"]), given, batch, rng.RNG_VERSION)
        return f"{out}/samples.txt, samples.jsonl"
    field = "image" if "image" in batch else loaded.config["data"].get("field")
    if field not in batch:
        raise UserError(f"{loaded.path} says that its data is {field}, and its sampler makes {', '.join(batch)}")
    several = len(prompt) if isinstance(prompt, list) and 1 < len(prompt) <= 20 else None
    columns = node.get("columns") or several or (10 if "label" in batch and cfg.n >= 10 else None)
    io.write_samples(out, field, batch[field], batch.get("label"), batch["seeds"], rng.RNG_VERSION, columns)
    path = ""
    if "frames" in batch:
        io.write_path(out, batch["frames"], columns)
        path = ", path.gif, path.png"
    if prompt is not None:
        captions.write(out, io.file_names(batch["seeds"], None), _repeated(prompt, cfg.n, "prompt"))
    return f"{out}/grid.png, samples.npz{path}"


def _unused(run: Path) -> Path:
    """The first of samples/0001, samples/0002, ... of a run, or beside a checkpoint of none, that is not there yet."""
    return next(path for i in range(1, 10**6) if not os.path.lexists(path := run / "samples" / f"{i:04d}"))


@contextlib.contextmanager
def bar() -> Iterator[OnStep]:
    """An on_step that draws a progress bar; nothing where output is no terminal."""
    from rich.progress import Progress

    with Progress(disable=not sys.stdout.isatty(), transient=True) as progress:
        task = progress.add_task("sampling", total=None)
        yield lambda i, n, state: progress.update(task, completed=i + 1, total=n)


@contextlib.contextmanager
def streamed(loaded: Loaded, prompt: Any, stop: str | None) -> Iterator[OnStep]:
    """An on_step that prints the first text while it is written, up to where it stops."""
    from genai.data import text

    given = resolve_prompts(prompt, stop, 1, loaded) or {}
    tokenizer, shown = text.from_state(loaded.assets["tokenizer"]), ""
    first = prompt[0] if isinstance(prompt, list | tuple) and prompt else prompt
    start = "" if first is None else tokenizer.decode(tokenizer.encode(str(first)).tolist())
    end, width = int(given["stop"]) if "stop" in given else None, 0

    def on_step(i: int, n: int, state: Batch) -> None:
        nonlocal shown, width
        tokens = state["tokens"][0].tolist()
        if len(tokens) <= width:  # another text
            width = sys.maxsize
            return
        width = len(tokens)
        ends = [k for k, token in enumerate(tokens) if token == end]
        written = start + tokenizer.decode(tokens[: ends[0]] if ends else tokens).rstrip("\ufffd")  # half a character
        if len(written) > len(shown):
            print(written[len(shown) :], end="", flush=True)
            shown = written

    yield on_step
    print()
