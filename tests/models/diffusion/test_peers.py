"""Parity with public implementations given the same schedule and the same network outputs."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from genai.core.protocols import Prediction
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.process import schedules
from genai.models.diffusion.process.paths import to_x0
from genai.models.diffusion.sampling import samplers, tables

KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def both(scheduler, table, kind, schedule, clip):
    """Walk theirs and ours through the same outputs from the same noise; float64."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    outs = {t: torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for t in table.times}
    theirs = start.clone()
    scheduler.alphas_cumprod = schedule.alpha**2  # float64, so that only the formulas are compared
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    for t in table.times:
        theirs = scheduler.step(outs[t], t, theirs).prev_sample

    def denoise(x, t):
        p, q = to_x0(kind, *schedule.alpha_sigma(t))
        return Prediction(outs[t], p=p, q=q)

    return theirs, samplers.run_table(denoise, table, start, torch.zeros(2, dtype=torch.int64), clip=clip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [10, 25, 100])
def test_ddim_equals_diffusers(kind, clip, steps):
    """With trailing spacing and eps re-derived from the clipped x0 (theirs keeps the old eps unless asked)."""
    schedule = schedules.linear(100)
    scheduler = DDIMScheduler(
        100,
        clip_sample=clip is not None,
        prediction_type=KINDS[kind],
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    table = tables.ddim(schedule, tables.discretize(schedule, steps))
    assert scheduler.timesteps.tolist() == table.times
    if clip is not None:
        step = scheduler.step
        scheduler.step = lambda *a: step(*a, use_clipped_model_output=True)
    theirs, ours = both(scheduler, table, kind, schedule, clip)
    assert (theirs - ours).abs().max() < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_mean_equals_diffusers(kind, monkeypatch):
    """The noise is left out on both sides; its size is compared with their variance."""
    T = 50
    schedule = schedules.linear(T)
    scheduler = DDPMScheduler(T, prediction_type=KINDS[kind], clip_sample=True, variance_type="fixed_small")
    scheduler.set_timesteps(T)
    table = tables.ddpm(schedule, tables.discretize(schedule, T))
    scheduler.alphas_cumprod = schedule.alpha**2
    for t, row in zip(table.times, table.rows[:-1], strict=False):
        assert scheduler._get_variance(t).item() == pytest.approx(row.s**2, rel=1e-9)
    silent = tables.Table(table.start, table.times, [row._replace(s=0.0) for row in table.rows])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.zeros(shape))
    theirs, ours = both(scheduler, silent, kind, schedule, 1.0)
    assert (theirs - ours).abs().max() < 1e-8


def test_cosine_schedule_equals_diffusers():
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    assert torch.allclose(schedules.cosine(1000).alpha ** 2, theirs, atol=1e-5)


def test_noise_of_a_forward_process_equals_diffusers():
    schedule = schedules.linear(1000)
    x0, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 10, 500, 999])
    theirs = DDPMScheduler(1000).add_noise(x0, eps, t)
    alpha, sigma = (s[t].float().view(4, 1, 1, 1) for s in (schedule.alpha, schedule.sigma))
    assert torch.allclose(alpha * x0 + sigma * eps, theirs, atol=1e-4)


def test_unet_has_the_size_of_ddpms():
    """Ho et al. 2020 report 35.7 M parameters for CIFAR-10; ours adds a scale to the shift, and the class embedding."""
    net = UNet([3, 32, 32], 128, [1, 2, 2, 2], 2, [16])
    parameters = sum(p.numel() for p in net.parameters())
    scale = sum(
        m.emb.weight[: m.emb.out_features // 2].numel() + m.emb.out_features // 2
        for m in net.modules()
        if hasattr(m, "emb")
    )
    assert parameters - scale == pytest.approx(35.7e6, rel=0.01)
