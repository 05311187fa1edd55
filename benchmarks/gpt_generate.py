"""Speed of writing text.

    python -m benchmarks.gpt_generate [--rounds 5] [--new 256]

Compares genai with Hugging Face, litgpt and x-transformers, each with its own cache. All write with the network of gpt_nano,
positions for 320 tokens, a prompt of 8 tokens, temperature 0.8 and top_k 50.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks import gpt
from benchmarks.common import installed, interleave, parse, ratio, report, setup, spread
from genai.models.autoregressive import decode

LENGTH, PROMPT, TEMPERATURE, TOP_K = 320, 8, 0.8, 50


def cases(batch: int, new: int, device: torch.device) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    prompt = torch.randint(0, gpt.VOCAB, (batch, PROMPT), device=device)
    seeds = torch.arange(batch)
    ours = gpt.ours(LENGTH).to(device).eval()
    made: dict[str, Callable[[], object]] = {
        "genai": lambda: decode.generate(ours, seeds, {"tokens": prompt}, None, new, TEMPERATURE, TOP_K)
    }
    if installed("transformers"):
        hf = gpt.hugging_face(LENGTH).to(device).eval()
        made["Hugging Face"] = lambda: hf.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            use_cache=True,
            pad_token_id=0,
        )
    if installed("x_transformers"):
        from x_transformers import AutoregressiveWrapper

        xt = AutoregressiveWrapper(gpt.x_transformers(LENGTH)).to(device).eval()
        made["x-transformers"] = lambda: xt.generate(
            prompt, new, temperature=TEMPERATURE, filter_kwargs={"k": TOP_K}, filter_logits_fn="top_k", cache_kv=True
        )
    if batch == 1 and installed("litgpt"):
        from litgpt.generate.base import generate

        lit = gpt.litgpt(LENGTH).to(device).eval()

        def litgpt() -> object:
            with torch.inference_mode():
                lit.clear_kv_cache()
                lit.set_kv_cache(batch_size=1, device=device)
                return generate(lit, prompt[0], PROMPT + new, temperature=TEMPERATURE, top_k=TOP_K)

        with torch.inference_mode():
            lit.max_seq_length = PROMPT + new
        made["litgpt"] = litgpt
    return made


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=256)
    return parse(parser, rounds=1, new=2)


def main() -> None:
    args = arguments()
    device, rows = setup(), []
    for batch in (1, 32):
        seconds = interleave(cases(batch, args.new, device), args.rounds, 1, device)
        for name, times in seconds.items():
            rows.append(
                {
                    "batch": batch,
                    "system": name,
                    "us/token": spread(times, 1e6 / args.new, 0),
                    "tokens/s": round(batch * args.new / statistics.median(times)),
                    "speedup of genai": round(ratio(times, seconds["genai"]), 2),
                }
            )
    report("gpt_generate", args, device, rows, ("batch", "system"), new_tokens=args.new)


if __name__ == "__main__":
    main()
