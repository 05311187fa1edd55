"""GPTs of one shape for gpt_train and gpt_generate: ours, one like nanoGPT's written by hand, and those of public packages."""

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.models.autoregressive.gpt import GPT
from genai.nn.transformer import scaled_init

VOCAB, LAYERS, HEADS, WIDTH = 65, 4, 4, 128


def config(length: int, *overrides: str) -> dict[str, Any]:
    """The composed config of gpt_nano at this context."""
    cfg = compose_config("train", ["model=gpt_nano", f"data.levels={VOCAB}", f"data.shape=[{length}]", *overrides])
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def ours(length: int) -> GPT:
    return build_typed(config(length)["model"])


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc, self.out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class Plain(nn.Module):
    """A GPT-2 of nanoGPT's shape, written by hand in its style."""

    def __init__(self, length: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks, self.norm = nn.ModuleList(PlainBlock() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        scaled_init(self)  # nanoGPT's initial weights; the factor for depth does not change the speed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def hugging_face(length: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=length,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=None,
        )
    )


def litgpt(length: int) -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT as LitGPT

    return LitGPT(
        Config(
            block_size=length,
            vocab_size=VOCAB,
            padded_vocab_size=VOCAB,
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=WIDTH,
            bias=False,
        )
    )


def x_transformers(length: int) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=length,
        attn_layers=Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=True),
    )
