"""The metrics of cards, which conf/metrics.yaml names, and the plan of an evaluation."""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from genai.checkpoint import Loaded
from genai.checkpoint.build import build_typed, reason
from genai.cli import conf_dir
from genai.core import extras
from genai.core.errors import UserError, at_least
from genai.core.protocols import Embedder, Infiller, Reconstructor, Scorable
from genai.core.runs import Facts
from genai.core.shapes import mean_flat
from genai.data.base import Data, Split, Subset
from genai.evaluation import features
from genai.metrics import audio, frechet, images, inception_score, kid, manifold, melody, retrieval, text


@dataclass
class RealFakePair:
    """The features of real images, all of a split, and of n generated ones.

    Computations that several metrics share are cached here. Precision, recall, density and coverage depend on n, so as many real
    images are used as generated ones.
    """

    real: features.FeatureSet
    fake: features.FeatureSet

    @functools.cached_property
    def precision_recall(self) -> manifold.PrecisionRecall:
        fake = self.fake.features
        return manifold.precision_recall(self.real.features[: len(fake)], fake)

    @functools.cached_property
    def density_coverage(self) -> manifold.DensityCoverage:
        fake = self.fake.features
        return manifold.density_coverage(self.real.features[: len(fake)], fake)


@dataclass
class GeneratedTexts:
    """Generated texts, and the training text as one string."""

    texts: list[str]
    train: str


@dataclass
class GeneratedSet:
    """Generated samples, and the items of the training split, each as the modality's `compared` returns it."""

    samples: list[Any]
    train: list[Any]


@dataclass
class Answers:
    """The answers written for N items of a split, as texts and as token ids, and the references of each; any of them is right."""

    texts: list[str]
    tokens: list[list[int]]
    references: list[list[str]]
    reference_tokens: list[list[list[int]]]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, data: Any, part: Split, written: list[list[int]]) -> "Answers":
        """Return token ids written for all items of a split, or of a subset of one, with the references."""
        whole: Any
        whole, index = (part.split, part.index) if isinstance(part, Subset) else (part, torch.arange(len(part)))
        right, decode = whole.references(index), data.modality.tokenizer.decode
        texts = [[decode(ids) for ids in each] for each in right]
        return cls([decode(ids) for ids in written], written, texts, right)


class Metric:
    """A metric of a checkpoint; subclass it for one of your own.

    `kind` decides what `__call__` is given, and what the card of the metric has:

    - "samples": given a `RealFakePair`, returns one number. The card has the spread over `repeats` sets of samples, a floor of
      real samples, and baselines that sample.
    - "texts": given `GeneratedTexts`, returns one number. The card has the spread and a floor, no baselines.
    - "melodies": given a `GeneratedSet` of melodies, each the notes of its voices, returns one number. The card is as for texts.
    - "answers": given `Answers`, returns values (N,) whose mean is the figure, or one number. The card has the mean with its
      bootstrap interval, and baselines that answer.
    - "likelihoods": given -ln p in nats (N,) of a split's items and the facts of the pass, returns values (N,). The card has
      their mean with its bootstrap interval.
    - "hidden": given the scores (N, 3) of `evaluation.hidden.score`, returns values (N,). The card is as for likelihoods.
    - "retrieval": given the labels (N,) of a split's items, or their indices, and their embeddings by medium, (N, D) each,
      returns values (N,). The card is as for likelihoods.
    - "reconstructions": given a model's reconstructions and the batch, both (B, ...), returns values (B,). The card is as for
      likelihoods.
    """

    kind: str = "samples"
    better: str = "lower"
    unit: str = ""
    reads: tuple[str, ...] = ()
    """Parts of every sample that the metric needs, kept in memory: any of "features", "probabilities" and "images".

    A metric without them uses `moments` and `right`, which are updated batch by batch in constant memory.
    """
    of_maps = False
    """True if a metric of reconstructions is given the `maps` of the modality, such as spectrograms, instead of both items."""
    uses_labels = False
    """True if the metric compares samples with the labels asked for; such a metric has no floor of real samples."""

    def __call__(self, *given: Any) -> Any:
        """Compute the metric; see the class for arguments and result."""
        raise NotImplementedError

    def of_mean(self, mean: float) -> float:
        """Return the figure of the mean of the values, an increasing function of it: itself."""
        return mean

    def suits(self, loaded: Loaded | None, data: Data) -> bool:
        """Tell whether the metric makes sense for a model, None for a baseline, on this data, apart from its `kind`."""
        return True

    def facts(self) -> Facts:
        """Return the settings that determine the figure, as plain values: figures with different ones are not compared."""
        kind = type(self)
        plain = {key: value for key, value in vars(self).items() if isinstance(value, str | int | float | list | None)}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **plain}


class Frechet(Metric):
    """Fréchet distance of features (Heusel et al. 2017)."""

    def __call__(self, sets: RealFakePair) -> float:
        return frechet.frechet(sets.fake.moments, sets.real.moments)


class KID(Metric):
    """Kernel distance of features, unbiased (Bińkowski et al. 2018)."""

    reads = ("features",)

    def __call__(self, sets: RealFakePair) -> float:
        return kid.kid(sets.real.features, sets.fake.features)


class InceptionScore(Metric):
    """Inception score of the extractor's class probabilities (Salimans et al. 2016)."""

    better, reads = "higher", ("probabilities",)

    def __call__(self, sets: RealFakePair) -> float:
        return inception_score.inception_score(sets.fake.probabilities).mean

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return features.modality_extractor(data) is None


class Manifold(Metric):
    """Precision or recall (Kynkäänniemi et al. 2019), density or coverage (Naeem et al. 2020) of features, by `figure`."""

    better, reads = "higher", ("features",)

    def __init__(self, figure: str):
        self.figure = figure

    def __call__(self, sets: RealFakePair) -> float:
        found = sets.precision_recall if self.figure in ("precision", "recall") else sets.density_coverage
        return getattr(found, self.figure)


class Accuracy(Metric):
    """The share of samples that the classifier of the features recognises as the label asked for."""

    better, uses_labels = "higher", True

    def __call__(self, sets: RealFakePair) -> float:
        return sets.fake.right / sets.fake.moments.n

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return "label" in loaded.conditions and features.modality_extractor(data) is None


class Distinct(Metric):
    """The share of distinct n-grams of words among all (Li et al. 2016)."""

    kind, better = "texts", "higher"

    def __init__(self, n: int):
        self.n = at_least(n, 1, "n")

    def __call__(self, texts: GeneratedTexts) -> float:
        return text.distinct([one.split() for one in texts.texts], self.n)


class LongestCopy(Metric):
    """The length of the longest string, in characters, that the samples share with the training text."""

    kind, unit = "texts", "characters"

    def __call__(self, texts: GeneratedTexts) -> float:
        return text.longest_copy("\n\n".join(texts.texts), texts.train).length


class Melody(Metric):
    """The mean over melodies of a figure of `genai.metrics.melody`: pitch_range, repetition or out_of_key, by `figure`.

    It is to be compared with that of real melodies, the floor of the card.
    """

    kind = "melodies"

    def __init__(self, figure: str, unit: str = ""):
        self.figure, self.unit = figure, unit

    def __call__(self, sets: GeneratedSet) -> float:
        function = getattr(melody, self.figure)
        return sum(map(function, sets.samples)) / len(sets.samples)


class MelodyCopy(Metric):
    """The mean over melodies of the successive notes that the training split has too, in any key.

    Real melodies quote each other as well: the floor of the card says how much.
    """

    kind, unit = "melodies", "notes"

    def __call__(self, sets: GeneratedSet) -> float:
        train = melody.join([notes for voices in sets.train for notes in voices])
        return sum(melody.copied_notes(voices, train) for voices in sets.samples) / len(sets.samples)


class ExactMatch(Metric):
    """The share of answers that are one of their references."""

    kind, better = "answers", "higher"

    def __call__(self, answers: Answers) -> Tensor:
        pairs = zip(answers.tokens, answers.reference_tokens, strict=True)
        return torch.tensor([float(tokens in right) for tokens, right in pairs])


class TokenErrorRate(Metric):
    """The edits that turn answers into their nearest references, divided by the tokens of those; the error rate of phonemes."""

    kind = "answers"

    def __call__(self, answers: Answers) -> Tensor:
        pairs = zip(answers.tokens, answers.reference_tokens, strict=True)
        found = [
            min((text.edit_distance(own, one) / max(len(one), 1), len(one)) for one in right) for own, right in pairs
        ]
        rate, length = torch.tensor(found, dtype=torch.float64).T
        return rate * length.clamp_min(1) / length.clamp_min(1).mean()


class BLEU(Metric):
    """BLEU of all answers, from 0 to 100 (Papineni et al. 2002), by sacrebleu with its default tokenizer (Post 2018)."""

    kind, better = "answers", "higher"

    def __call__(self, answers: Answers) -> float:
        sacrebleu = extras.load("sacrebleu", "text", "the metric bleu")
        most = max(map(len, answers.references))
        columns = [[right[k] if k < len(right) else None for right in answers.references] for k in range(most)]
        return sacrebleu.corpus_bleu(answers.texts, columns).score


class Likelihood(Metric):
    """-ln p of items in the unit of a `fact` of the pass, such as bits_per_dim.

    The fact is the mean over all items; each item's value is its share of that.
    """

    kind = "likelihoods"

    def __init__(self, fact: str):
        self.fact, self.unit = fact, fact.replace("_per_", "/")

    def __call__(self, nats: Tensor, facts: Mapping[str, Any]) -> Tensor:
        mean = nats.mean().item()  # 0 for a text of one symbol
        return nats * (facts[self.fact] / mean if mean else 1.0)

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return self.fact in data.modality.likelihoods


class Hidden(Metric):
    """The mean over hidden tokens of nats or accuracy, or pseudo_perplexity, exp of the mean nats (Salazar et al. 2020).

    An item's value is its share of the mean.
    """

    kind = "hidden"

    def __init__(self, figure: str):
        self.figure = figure
        if figure == "accuracy":
            self.better = "higher"
        elif figure == "nats":
            self.unit = "nats"

    def __call__(self, scores: Tensor) -> Tensor:
        return scores[:, int(self.figure == "accuracy")] / scores[:, 2].mean()

    def of_mean(self, mean: float) -> float:
        return math.exp(mean) if self.figure == "pseudo_perplexity" else mean


class Retrieval(Metric):
    """The share of queries for which one of the k nearest items of another medium has the query's label, or is its other half.

    Args:
        k: items retrieved.
        query, gallery: names of media; None for the mean over all, in every direction.
    """

    kind, better = "retrieval", "higher"

    def __init__(self, k: int = 1, query: str | None = None, gallery: str | None = None):
        self.k, self.query, self.gallery = at_least(k, 1, "k"), query, gallery

    def __call__(self, label: Tensor, embeddings: Mapping[str, Tensor]) -> Tensor:
        pairs = [
            (one, other)
            for one, other in itertools.permutations(embeddings, 2)
            if self.query in (None, one) and self.gallery in (None, other)
        ]
        if not pairs:
            raise UserError(
                f"query={self.query} and gallery={self.gallery} must be two of the media {', '.join(embeddings)}, or null"
            )
        return torch.stack([retrieval.hits(embeddings[a], embeddings[b], label, self.k) for a, b in pairs]).mean(0)


class PSNR(Metric):
    """Peak signal-to-noise ratio of reconstructions, in dB."""

    kind, better, unit = "reconstructions", "higher", "dB"

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return images.psnr(again, x)

    def suits(self, loaded: Loaded | None, data: Data) -> bool:
        return not data.modality.has_time


class SSIM(Metric):
    """Structural similarity of reconstructions (Wang et al. 2004)."""

    kind, better = "reconstructions", "higher"

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return images.ssim(again, x)

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return not data.modality.has_time and min(data.shape[1:], default=0) >= images.WINDOW


class OfSound(Metric):
    """A metric of reconstructions of sound."""

    kind = "reconstructions"

    def suits(self, loaded: Loaded | None, data: Data) -> bool:
        return data.modality.has_time


class MelL1(OfSound):
    """The mean absolute difference of log-mel spectrograms, in the scale of `genai.nn.mel.LogMel`; padding counts."""

    of_maps = True

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return mean_flat((again - x).abs())


class STFTDistance(OfSound):
    """Multi-resolution STFT distance of reconstructions (Engel et al. 2020); padding counts."""

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return audio.stft_distance(again, x)


class SISDR(OfSound):
    """Scale-invariant signal-to-distortion ratio of reconstructions (Le Roux et al. 2019), in dB."""

    better, unit = "higher", "dB"

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return audio.si_sdr(again, x)


PASS_KINDS = (
    "likelihoods",
    "hidden",
    "retrieval",
    "reconstructions",
)  # kinds of metrics that one pass over a split computes
KINDS = "samples", "texts", "melodies", "answers", *PASS_KINDS
SAMPLE_PARTS = "features", "probabilities", "images"  # what can be kept of each sample


@functools.cache
def standard_metrics() -> dict[str, Metric]:
    """Build the metrics of conf/metrics.yaml, by name."""
    table: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "metrics.yaml"))
    return {name: build_typed(node) for name, node in table.items()}


def compute(name: str, metric: Metric, *given: Any) -> Tensor:
    """Call a metric and return its values (N,) in float64 on the CPU: one for each item in a pass, either of answers, else one.

    Raises UserError if the metric fails, or returns another number of values or values that are not finite.
    """
    n = len(given[0]) if metric.kind in (*PASS_KINDS, "answers") else 1
    try:
        values = torch.as_tensor(metric(*given), dtype=torch.float64).cpu()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"metrics: {name} fails ({type(error).__name__}: {reason(error)}): change its class") from error
    count = values.numel()
    if count not in ((1, n) if metric.kind == "answers" else (n,)) or (
        metric.kind not in PASS_KINDS and not values.isfinite().all()
    ):
        wanted = "one number for each item" if metric.kind in PASS_KINDS else "one finite number"
        wanted += ", or one for each item" if metric.kind == "answers" else ""
        what = values.item() if count == 1 else f"numbers of shape {list(values.shape)}"
        raise UserError(f"metrics: {name} gives {what}, and {metric.kind} need {wanted}: change its class")
    return values.reshape(count)


def compute_pairs(name: str, metric: Metric, data: Data, again: Tensor, x: Tensor) -> Tensor:
    """Compute a metric of reconstructions and the items x, (N,): of both, or of their maps."""
    pair = (data.modality.maps(again), data.modality.maps(x)) if metric.of_maps else (again, x)
    return compute(name, metric, *pair)


def custom_facts(name: str, metric: Metric) -> Facts:
    """Return the settings of a metric that is not the standard one of that name; an empty dict for the standard one."""
    return {} if standard_metrics().get(name) is metric else metric.facts()


def can_compute(metric: Metric, loaded: Loaded, data: Data, method: object = None) -> bool:
    """Tell whether a metric can be computed for a model.

    Args:
        data: the data, as images where the model works on images as tokens.
        method: config node of a likelihood that is not the model's own.
    """
    given = {
        "likelihoods": isinstance(loaded.model, Scorable) or method is not None,
        "hidden": isinstance(loaded.model, Infiller),
        "retrieval": isinstance(loaded.model, Embedder),
        "reconstructions": isinstance(loaded.model, Reconstructor),
    }
    return given.get(metric.kind, data.modality.comparison == metric.kind) and metric.suits(loaded, data)
