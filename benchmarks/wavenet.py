"""Speed of sampling from a WaveNet. Its recordings have 8,000 samples a second.

    python -m benchmarks.wavenet [--rounds 5] [--new 1000]

The network of wavenet_fsdd, with both of its outputs. `queues in torch` is the loop that PyTorch implementations write, a queue
for each layer; `whole network` computes the receptive field anew for each sample, and is timed on fewer of them.
"""

import argparse
import statistics
from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.common import interleave, parse, ratio, report, setup, spread
from genai.models.autoregressive import decode
from genai.models.autoregressive.wavenet import Categorical, Logistics, WaveNet
from genai.models.autoregressive.wavenet_cpu import ArrayQueues

LEVELS, DILATIONS = 256, [2**i for i in range(10)]


def network(output: Categorical | Logistics, device: torch.device) -> WaveNet:
    torch.manual_seed(0)
    model = WaveNet("tokens", LEVELS, 8000, 10, 6, None, None, 0.1, 32, 32, 4, 32, 2, DILATIONS, output)
    return model.to(device).eval()


def cases(batch: int, new: int, device: torch.device) -> dict[str, tuple[int, Callable[[], object]]]:
    """The samples of each stream that a case makes, and the case, by name."""
    seeds, few = torch.arange(batch), max(new // 100, 2)
    softmax, mixture = network(Categorical(LEVELS), device), network(Logistics(LEVELS, 5), device)
    context = torch.full((batch, softmax.receptive_field), softmax.first, device=device)

    def whole() -> None:
        with torch.inference_mode():
            for _ in range(few):
                out, _ = softmax.outputs(context, softmax.biases(None, batch)[:, None])
                decode.draw(softmax.output.log_probs(out[:, -1]).exp(), torch.rand(batch, 1, device=device))

    def queues() -> None:
        with patch.object(ArrayQueues, "suits", lambda _: False):
            decode.generate(softmax, seeds, max_new_tokens=new)

    return {
        "genai": (new, lambda: decode.generate(softmax, seeds, max_new_tokens=new)),
        "genai, mixture of logistics": (new, lambda: decode.generate(mixture, seeds, max_new_tokens=new)),
        "queues in torch": (new, queues),
        "whole network": (few, whole),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=1000)
    return parse(parser, rounds=1, new=4)


def main() -> None:
    args = arguments()
    device, rows = setup(), []
    for batch in (1, 64):
        made = cases(batch, args.new, device)
        seconds = interleave({name: call for name, (_, call) in made.items()}, args.rounds, 1, device)
        each = {name: [t / made[name][0] for t in times] for name, times in seconds.items()}
        for name, times in each.items():
            rows.append(
                {
                    "batch": batch,
                    "system": name,
                    "us/step": spread(times, 1e6, 0),
                    "samples/s": round(batch / statistics.median(times)),
                    "speedup of genai": round(ratio(times, each["genai"]), 2),
                }
            )
    report("wavenet", args, device, rows, ("batch", "system"), new_samples=args.new)


if __name__ == "__main__":
    main()
