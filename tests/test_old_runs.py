"""A user's old runs: small ones of every family, as an earlier version wrote them, still sample and go on as they did.

`tests/old/runs_of_format_1.tar.xz` holds run directories, five steps each by train.py, and `expected_1.npz` what the version
that wrote them made of them: samples by seed, and the norm of every weight after two more steps. Neither is ever written anew.
"""

import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import genai
from genai import checkpoint
from genai.cli import composed, resumed
from genai.train.run import run

OLD = Path(__file__).parent / "old"
NAMES = ["autoencoder_adversarial", "biggan", "ddpm", "ddpm_levels", "ddpm_mlp", "dit", "edm", "first", "flow", "gan",
         "gpt", "gpt_digits", "latent", "stylegan2", "vae", "vqvae"]  # fmt: skip
FIELDS = ("image", "vector", "tokens", "log_prob")


def unpack(folder: Path, name: str) -> None:
    """The run `name` and the first stage that one of them was trained on."""
    with tarfile.open(OLD / "runs_of_format_1.tar.xz") as archive:
        members = [m for m in archive.getmembers() if m.name.split("/")[0] in (name, "first")]
        archive.extractall(folder, members)


def samples(folder: Path) -> dict[str, np.ndarray]:
    batch = genai.sample(genai.load(folder), n=4, seed=3)
    return {name: batch[name].numpy() for name in FIELDS if name in batch}


def go_on(folder: Path) -> dict[str, float]:
    """Norms of all weights, live and averaged, after two more steps."""
    run(composed("train", [f"resume={folder}", "max_steps=7"], resumed))
    content = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    assert content["step"] == 7
    weights = {f"{part}.{k}": v for part in ("model", "ema") for k, v in content[part].items()}
    return {k: v.double().norm().item() for k, v in weights.items() if v.is_floating_point()}


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_samples_and_goes_on_as_it_did(tmp_path, monkeypatch, name):
    unpack(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    with np.load(OLD / "expected_1.npz") as file:
        expected = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    for field, values in samples(Path(name)).items():
        np.testing.assert_allclose(values, expected.pop(field), atol=1e-4, err_msg=field)
    norms = go_on(Path(name))
    assert [*norms] == expected.pop("weights").tolist()
    if name != "gpt" or sys.version_info[:3] == (3, 11, 7):  # it learns Python's own documentation
        np.testing.assert_allclose(list(norms.values()), expected["norms"], rtol=2e-3, atol=1e-6)
    assert [*expected] == ["norms"]
