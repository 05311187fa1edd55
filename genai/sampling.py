"""Sampling from a loaded checkpoint; the command line and Python share this code."""

import contextlib
import copy
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genai import checkpoint, nodes, progress
from genai.checkpoint import Loaded
from genai.checkpoint.build import DATA, MODELS, build_stored, check_target
from genai.core import files, rng, stored
from genai.core.errors import UserError, at_least, show
from genai.core.precision import cast_for_inference
from genai.core.protocols import Batch, Embedder, OnStep, check_sampler, model_parts, with_items
from genai.modalities.base import Request, as_path, check_values
from genai.modalities.stored import difference
from genai.ranges import check as ranges
from genai.rerank import note, reranked

MAX_SAMPLES = 10**8  # per call
ARGUMENTS = ("guidance", "guidance_interval", "autoguidance", "image", "audio", "strength", "mask", "invert", "frames")
"""Keys of sample.yaml that are options of the sampler."""


def sample(
    loaded: Loaded,
    n: int = 16,
    seed: int = 0,
    label: object = None,
    speaker: object = None,
    mel: object = None,
    prompt: object = None,
    negative_prompt: object = None,
    stop: object = None,
    sampler: dict | None = None,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    image: object = None,
    audio: object = None,
    mask: object = None,
    frames: bool = False,
    rerank: int | None = None,
    scorer: object = None,
    progress: bool = False,
    **arguments: object,
) -> Batch:
    """Draw n samples; sample i depends only on seed + i, its label or prompt, its image, and the sampler.

    Args:
        label: index, name, or a list of them; shorter lists repeat. None takes the classes in turn.
        speaker: as label, for models of several speakers.
        mel: sound file whose log-mel spectrogram samples follow, or a list of them; shorter lists repeat.
        prompt: for models of text, or with captions, a string or a list of them; for models of sound, the files that
            samples continue; shorter lists repeat. None starts a new sample, or leaves the caption out.
        negative_prompt: caption that samples are guided away from.
        stop: string before which a sample ends, or a list of them; the end of a document, if the model has one, ends it too.
        sampler: a config node; None is the sampler that the checkpoint was trained with.
        batch_size: samples drawn at once.
        on_step: called as on_step(step so far, steps of all batches, state).
        progress: show a progress bar, or lines if there is no terminal.
        image: image to start from, a file, a folder, or (m, C, H, W) in [-1, 1]; fewer than n repeat.
        audio: as image, for models of sound: (m, C, T).
        mask: the part of the image or sound to fill in: a file whose white is filled and whose black is kept, [from, to] in
            seconds of sound, None for an end, or 1 and 0 in (1 or C, H, W) or (1 or C, T).
        frames: also return `frames` (k, steps + 1, ...), the intermediate states of the first k samples.
        rerank: candidates that are drawn for each sample, of which `scorer` chooses one, see `genai.rerank.reranked`.
        scorer: run or checkpoint of a model that embeds samples and what they are asked for, such as model=contrastive.
        arguments: options of the sampler, such as steps, guidance, strength, or autoguidance, a run or checkpoint.

    Returns: the sampler's batch on the CPU, with `seeds` (n,) and, for a model with classes, `label` (n,), as `speaker` (n,).

    Raises UserError for an argument out of range, or one that model or sampler do not take.
    """
    if not isinstance(loaded, Loaded):
        hint = repr(str(loaded)) if isinstance(loaded, str | os.PathLike) else "..."
        raise UserError(
            f"loaded must be a loaded model, got {show(loaded)}: sample(load({hint})) samples from a run or checkpoint"
        )
    n = at_least(n, 1, "n")
    if n > MAX_SAMPLES:
        raise UserError(f"n={n} is more samples than one call can hold: give at most {MAX_SAMPLES}")
    batch_size, seed = at_least(batch_size, 1, "batch_size"), at_least(seed, 0, "seed")
    if on_step is not None and not callable(on_step):
        raise UserError(f"on_step must be a function on_step(step, steps, state), got {show(on_step)}")
    arguments = check_arguments(arguments)
    if sampler is not None and not isinstance(sampler, dict):
        raise UserError(
            f"sampler={show(sampler)} must be a config node such as those in conf/sampler: a dict with _target_"
        )
    seeds = rng.seed_range(seed, n)
    raised: list[Exception] = []  # by on_step
    shown = bar() if progress and on_step is None else contextlib.nullcontext(on_step)
    with checkpoint.explain_errors(loaded, raised), shown as on_step:
        starts = {"image": image, "audio": audio}
        request = {
            "label": label,
            "speaker": speaker,
            "mel": mel,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "stop": stop,
        }
        ends = loaded.modality.stop(request)
        wanted = ["image"] * any(start is not None for start in starts.values()) + ["mask"] * (mask is not None)
        run = bind(loaded, sampler, arguments, [*wanted, *["frames"] * frames, *["stop"] * (ends is not None)])
        run = run if ends is None else functools.partial(run, stop=ends)
        if rerank is not None or scorer is not None:
            run = reranked(run, _scorer(loaded, rerank, scorer, frames), loaded.modality.field, rerank or 1)
        cond, started = conditions(request, n, loaded), resolve_start(starts, mask, n, loaded)
        chunks, firsts = [], range(0, n, batch_size)
        for k, first in enumerate(firsts):
            part = slice(first, first + batch_size)
            watch = None if on_step is None else _shift_steps(on_step, k, len(firsts), raised)
            given = {name: value[part] for name, value in cond.items()}
            special = {name: value[part] for name, value in started.items()} | (
                {"frames": True} if frames and k == 0 else {}
            )
            with loaded.autocast():
                chunks.append(run(loaded.model, seeds[part], given or None, watch, **special))
        batch = {name: torch.cat([chunk[name].cpu() for chunk in chunks if name in chunk]) for name in chunks[0]}
        batch |= loaded.modality.decode(batch)
    given = {name: cond[name] for name in ("label", "speaker") if name in cond}
    return {**batch, "seeds": seeds, **given}


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return options of the sampler with numpy's numbers and paths as plain values; raises UserError for one that is out of its
    range in sample.yaml."""
    found = {key: value.item() if isinstance(value, np.generic) else value for key, value in arguments.items()}
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    if isinstance(path := found.get("autoguidance"), os.PathLike):
        found["autoguidance"] = os.fspath(path)
    for key in [key for key in found if key in ARGUMENTS]:
        value, range_ = found[key], ranges.range_of(f"sample:{key}", key)
        if not range_.holds(value) and not (key == "autoguidance" and isinstance(value, dict)):
            raise UserError(f"{key}={show(value)} {ranges.sentence(range_, value)}")
    return found


def _shift_steps(on_step: OnStep, k: int, chunks: int, raised: list[Exception]) -> OnStep:
    """Return on_step with the steps counted over all batches; what it raises joins `raised`."""

    @functools.wraps(on_step)
    def shifted(i: int, steps: int, state: Batch) -> None:
        try:
            on_step(k * steps + i, chunks * steps, state)
        except Exception as error:
            raised.append(error)
            raise

    return shifted


def bind(
    loaded: Loaded, given: dict | None, arguments: dict[str, Any], wanted: Sequence[str] = ()
) -> Callable[..., Batch]:
    """Build a sampler from a config node, also an older one, and set options of it or of a node in it.

    Without a node it is the sampler that the checkpoint was trained with, less other checkpoints, which the user has to
    name. Raises UserError for an option, or a key in `wanted`, that it does not have.
    """
    node = copy.deepcopy(stored.up_to_date(given or loaded.config["sampler"]))
    kinds = model_parts(check_target(node.get("_target_"), loaded.trust))
    parts = {key: node[key] for key in kinds if given and isinstance(node.get(key), str | dict)}
    node |= dict.fromkeys(kinds.keys() & node.keys())
    made = build_stored(node, loaded.trust)
    own, more = nodes.arguments(node), inspect.signature(made).parameters.values()
    own = {**own, **{p.name: p.name for p in more if p.kind is p.KEYWORD_ONLY and p.name not in own}}
    for key in [*arguments, *wanted]:
        if key not in own:
            raise UserError(f"the sampler {nodes.name_of(node)} has no {key}; it has {', '.join(own)}")
    for key, value in arguments.items():
        *groups, last = own[key].split(".")
        functools.reduce(lambda at, group: at[group], groups, node)[last] = value
    parts |= {key: node.pop(key) for key in kinds if isinstance(node.get(key), str | dict)}
    extras = {key: _part(loaded, key, value, kinds[key]) for key, value in parts.items()}
    run = with_items(functools.partial(build_stored(node, loaded.trust), **extras), items_of(loaded))
    try:
        inspect.signature(run).bind(None, None, None, None)
    except TypeError as error:
        raise UserError(f"the sampler {node['_target_']} cannot be called: {error}") from error
    check_sampler(run, loaded.model)
    return run


def _part(loaded: Loaded, key: str, named: str | dict, kind: type) -> nn.Module:
    """Load another model that a sampler calls, from a run, a checkpoint, or a node of `pretrained`.

    Raises UserError unless it is of the type that the sampler needs and has the same modalities.
    """
    node = {"ckpt": named} if isinstance(named, str) else named
    part = checkpoint.adopt(node, key, loaded.trust)
    if not isinstance(part.model, kind):
        found, wanted = (f"{'an' if k.__name__[0] in 'AEIO' else 'a'} {k.__name__}" for k in (type(part.model), kind))
        raise UserError(f"{key}={part.path} is {found}, and must be {wanted}")
    kinds = checkpoint.modalities(part.content, part.model)
    if what := difference(kinds, loaded.modality, loaded.conditions):
        raise UserError(f"{key}={part.path} has another {what} than {loaded.path}: they must share one")
    return cast_for_inference(part.model, loaded.precision).requires_grad_(False).eval().to(loaded.device)


def _scorer(loaded: Loaded, rerank: Any, scorer: Any, frames: bool) -> Any:
    """Load the model that chooses among candidates. Raises UserError unless both arguments are given, and for frames of them."""
    if rerank is None or scorer is None:
        raise UserError(
            f"rerank={show(rerank)} and scorer={show(scorer)}: a number of candidates and the model that chooses among them "
            "belong together: give both, or none"
        )
    at_least(rerank, 1, "rerank")
    if frames:
        raise UserError("frames=true shows the path to one sample, and rerank= draws several: leave one out")
    return _part(loaded, "scorer", os.fspath(scorer) if isinstance(scorer, os.PathLike) else scorer, Embedder)


def resolve_start(given: Mapping[str, Any], mask: Any, n: int, loaded: Loaded) -> Batch:
    """Return what a sampler calls `image` (n, C, ...) and `mask` (n, 1 or C, ...), as far as given, on the CPU.

    `given` has the samples to start from by the key of their modality, `Modality.start`. The argument `mask` is 1 where they are
    filled in, the `mask` that is returned 1 where they are kept. Raises UserError for the key of another modality.
    """
    kind, shape, found = loaded.modality, getattr(loaded.model, "data_shape", ()), {}
    for key, start in given.items():
        if start is None:
            continue
        if key != kind.start:
            raise UserError(f"{key}= was given, but samples of this model are {kind.field}: give {kind.start}=")
        x = start if isinstance(start, Tensor) else kind.read(as_path(start, key), shape, key)
        kind.check(x, key)
        found["image"] = x.repeat(-(-n // len(x)), *[1] * (x.ndim - 1))[:n]
    if mask is not None:
        filled = mask if isinstance(mask, Tensor) else kind.read_mask(mask, shape)
        filled = filled.float() if filled.dtype == torch.bool else filled
        check_values(filled, "mask", 0, 1)
        if filled.ndim > len(shape) and len(filled) not in (1, n):
            raise UserError(f"mask holds {len(filled)} masks for n={n} samples: give one, or one for each")
        found["mask"] = (1 - filled).expand(n, *filled.shape[-len(shape) :])
    return found


def items_of(loaded: Loaded) -> Callable[..., Tensor]:
    """Return `Data.items` of the data that a checkpoint was trained on; the data are built at the first call."""
    data = functools.cache(lambda: build_stored(loaded.config["data"], loaded.trust, (MODELS, DATA)))
    return lambda *which: data().items(*which)


REFUSED = {
    "negative_prompt": "negative_prompt={!r} was given, but this model takes no prompt",
    "label": "label={} was given, but this model is unconditional",
    "speaker": "speaker={} was given, but this model has no speakers",
    "mel": "mel={} was given, but this model follows no spectrogram",
    "prompt": "prompt={!r} was given, but this model takes no text",
    "stop": "stop={!r} was given, but this model takes no text",
}


def conditions(request: Request, n: int, loaded: Loaded) -> Batch:
    """Return the conditions of n samples: the beginning of the output itself, and those that the request names, else
    all.

    Raises UserError for a condition that the model does not take.
    """
    known = {key for modality in (loaded.modality, *loaded.conditions.values()) for key in modality.keys}
    for key in ("label", "speaker", "mel", "prompt", "negative_prompt"):
        if isinstance(given := request.get(key), list | tuple) and len(given) > n:
            raise UserError(
                f"{key}= has {len(given)} values for n={n} samples: give at most as many, or n={len(given)}"
            )
    for key, sentence in REFUSED.items():
        if request.get(key) is not None and key not in known:
            raise UserError(f"{sentence.format(request[key])}: leave {key}= out")
    takes = list(loaded.conditions.values())
    named = [modality for modality in takes if any(request.get(key) is not None for key in modality.keys)]
    return {k: v for m in (loaded.modality, *(named or takes)) for k, v in m.condition(request, n).items()}


def run(cfg: Any) -> Path:
    """Run `sample.py`: load, sample with a progress bar or streaming text, and write files; returns their folder."""
    if cfg.out is not None:
        files.check_folder(Path(cfg.out), "out")
    loaded, request, settings = _prepare(cfg)
    for condition in loaded.conditions.values():
        request = dict(condition.completed(request, cfg.n))
    with loaded.modality.watch(request) or bar() as on_step:
        batch = sample(loaded, cfg.n, cfg.seed, on_step=on_step, **request, **settings)
    home = checkpoint.folder_of(loaded.path)
    out = Path(cfg.out) if cfg.out is not None else _free_folder(home)
    with files.check_writable(out, "name another folder with out="):
        files.make_folder(out, None if cfg.out is not None else home)
        written = _write(out, loaded, batch, request, settings)
    print(f"{cfg.n} samples of {loaded.path} (step {loaded.step}, {cfg.weights} weights): {written}")
    return out


def converse(cfg: Any) -> None:
    """Run `sample.py prompt=-`: show one sample for each line that is typed, while it is written, until the input ends.

    Line i gets seed + i. A line that cannot be a prompt is answered by a sentence if a person types, and else ends the command.
    Nothing is written to files.

    Raises UserError for a model whose samples are not shown while they are written, and for keys that would have no effect.
    """
    for key, default in (("out", None), ("n", 100)):
        if cfg[key] != default:
            raise UserError(
                f"{key}={cfg[key]} has no effect with prompt=-, which shows one sample for each line: leave it out"
            )
    loaded, request, settings = _prepare(cfg)
    if loaded.modality.watch({}) is None:
        raise UserError(
            f"prompt=- is for a model of text, and samples of this one are {loaded.modality.field}: leave it out"
        )
    for i, line in enumerate(_typed_lines()):
        given = {**request, "prompt": unescape(line)}
        try:
            loaded.modality.condition(given, 1)  # before anything is shown
            with loaded.modality.watch(given) or contextlib.nullcontext() as on_step:
                sample(loaded, 1, cfg.seed + i, on_step=on_step, **given, **settings)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(error, file=sys.stderr)


def _typed_lines() -> Iterator[str]:
    """Yield the lines of standard input, with a mark in front where a person types."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and repeated by the arrow keys
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError(
                "the prompts that prompt=- reads are not UTF-8: convert them, for instance with iconv"
            ) from None


def _prepare(cfg: Any) -> tuple[Loaded, dict[str, Any], dict[str, Any]]:
    """Return the loaded model, the request, and further arguments of `sample`, as a config of `sample.py` says."""
    from omegaconf import OmegaConf

    given = {key: cfg[key] for key in ("label", "speaker", "mel", "prompt", "negative_prompt")}
    request: dict[str, Any] = {k: OmegaConf.to_container(v) if OmegaConf.is_list(v) else v for k, v in given.items()}
    request["stop"] = [*map(unescape, cfg.stop)] if OmegaConf.is_list(cfg.stop) else unescape(cfg.stop)
    if cfg.prompt_file is not None:
        if cfg.prompt is not None:
            raise UserError(f"prompt_file={cfg.prompt_file} and prompt= both give the prompt: leave one out")
        request["prompt"] = _prompt_in(Path(cfg.prompt_file))
    with progress.task("loading the checkpoint"):
        loaded = checkpoint.load(cfg.ckpt, cfg.weights, cfg.device, cfg.trust, cfg.precision, cfg.compile)
    kwargs: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(ARGUMENTS)))
    kwargs = {key: value for key, value in kwargs.items() if value is not None and value is not False}
    kwargs |= {"rerank": cfg.rerank, "scorer": cfg.scorer}
    kwargs |= {"sampler": OmegaConf.to_container(cfg.sampler, resolve=True), "batch_size": cfg.batch_size}
    return loaded, request, kwargs


def _prompt_in(path: Path) -> str:
    """Return the text of a file as it is, to the last line break. Raises UserError if it cannot be read, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"prompt_file={path} cannot be read ({why}): name a UTF-8 text file") from None
    if not text:
        raise UserError(f"prompt_file={path} is empty: leave it out, or name a file with a prompt")
    return text


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(stop: object) -> Any:
    """Replace \n, \t, \r and \\ in what was typed by the characters they stand for; a shell passes them on as they
    are."""
    return re.sub(r"\\([ntr\\])", lambda m: ESCAPES[m[1]], stop) if isinstance(stop, str) else stop


def _write(out: Path, loaded: Loaded, batch: Batch, request: Request, settings: dict[str, Any]) -> str:
    """Write the samples to an existing folder and return the names of the files."""
    kind, n, prompt = loaded.modality.kind_in(batch), len(batch["seeds"]), request["prompt"]
    if kind is None:
        field = loaded.modality.field
        raise UserError(f"{loaded.path} says that its data is {field}, and its sampler makes {', '.join(batch)}")
    several = len(prompt) if isinstance(prompt, list) and 1 < len(prompt) <= 20 else None
    columns = settings["sampler"].get("columns") or (several and several * max(1, round(n**0.5 / several)))
    names = file_names(batch["seeds"], batch.get("label"), batch.get("original"))
    with checkpoint.explain_errors(loaded):
        written = kind.write(out, batch, names, request, columns)
        for condition in loaded.conditions.values():
            condition.note(out, names, request)
    if "candidate" in batch:
        written += note(out, names, batch, settings["rerank"], settings["scorer"])
    return f"{out}/{', '.join(written)}"


def file_names(seeds: Tensor, labels: Tensor | None, original: Tensor | None = None) -> list[str]:
    """Return the names seed_000007, with labels seed_000007_label_3, and seed_000007_original for items of the data."""
    names = [f"seed_{seed:06d}" for seed in seeds.tolist()]
    if labels is not None:
        names = [f"{name}_label_{label}" for name, label in zip(names, labels.tolist(), strict=True)]
    if original is not None:
        names = [f"{name}_original" if one else name for name, one in zip(names, original.tolist(), strict=True)]
    return names


def _free_folder(run: Path) -> Path:
    """Return the first of samples/0001, samples/0002, ... below a run, or next to a checkpoint, that does not exist."""
    return next(path for i in range(1, 10**6) if not os.path.lexists(path := run / "samples" / f"{i:04d}"))


@contextlib.contextmanager
def bar() -> Iterator[OnStep]:
    """Return a context whose on_step shows the steps, of whole batches with a CUDA graph; see `genai.progress`."""
    with progress.task("sampling", unit="steps") as task:
        on_step = progress.follow(task)
        on_step.counts_only = True  # type: ignore[attr-defined]
        yield on_step


if __name__ == "__main__":
    raise SystemExit("error: this module is not a command: type genai sample, or python sample.py")
