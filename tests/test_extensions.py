"""What a researcher adds in a package of their own, with nothing of this repository edited: a data set, a loss and a solver here,
a family in test_docs, a modality in test_modalities, a metric in test_cards."""

import numpy as np
import pytest

FILES = {
    "my_lab/rings.py": '''
import numpy as np
from genai.data.base import Arrays, Data

class Ring(Data):
    """Points on a circle."""
    def __init__(self, radius, field, shape, classes, levels, batch_size, num_workers=0):
        angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 60)
        x = radius * np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        cuts = {"train": x[:40], "val": x[40:50], "test": x[50:]}
        super().__init__(
            field=field, shape=shape, classes=classes, levels=levels, batch_size=batch_size, num_workers=num_workers,
            splits={name: Arrays(field, part, None) for name, part in cuts.items()},
            found_shape=[2], class_names=None, found_levels=None,
        )
''',
    "my_lab/conf/data/ring.yaml": """
_target_: my_lab.rings.Ring
radius: 2.0
batch_size: 8
num_workers: 0
field: vector
shape: [2]
classes: null
levels: null
""",
    "my_lab/losses.py": """
def twice(schedule, q):
    return 2 * q**0
""",
    "my_lab/solvers.py": """
import itertools
from genai.kernels.affine_step import Row
from genai.models.diffusion.sampling.tables import Table

def mine(path, levels):
    rows = []
    for t, s in itertools.pairwise(levels):
        a = s.sigma / t.sigma
        rows.append(Row(a=a, b=s.alpha - a * t.alpha, alpha=s.alpha, sigma=s.sigma))
    return Table(levels[0], [level.t for level in levels[:-1]], rows)
""",
    "my_lab/conf/sampler/mine.yaml": """
defaults: [ddim]
solver: {_target_: my_lab.solvers.mine, _partial_: true}
""",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


TINY = [
    "--config-dir",
    "my_lab/conf",
    "data=ring",
    "model=ddpm_mlp",
    "model.net.width=8",
    "model.net.blocks=1",
    "model.schedule.steps=20",
    "sampler.steps=5",
    "max_steps=1",
    "log_every_steps=1",
    "ema.decay=0.9",
]


def trained(command, house, name, *arguments):
    """A run of one step; its loss."""
    done = command("train.py", *TINY, *arguments, f"run_dir={name}", cwd=house)
    assert done.returncode == 0, done.stderr
    lines = [line.split(",") for line in (house / name / "metrics.csv").read_text().splitlines()]
    return next(float(value) for step, key, value in lines if (step, key) == ("1", "train/loss"))


def test_data_loss_and_solver_of_ones_own_package(house, command):
    """Data from a circle; twice the simple loss is twice as large; DDIM's equation, written again, gives what ddim gives."""
    plain = trained(command, house, "plain")
    own = trained(command, house, "own", "sampler=mine", "model.weighting._target_=my_lab.losses.twice")
    assert own == pytest.approx(2 * plain, rel=1e-5)

    refused = command("sample.py", "ckpt=own", cwd=house)
    assert refused.returncode == 2 and "add trust=my_lab" in refused.stderr
    done = command("sample.py", "ckpt=own", "trust=my_lab", "n=4", "out=mine", cwd=house)
    assert done.returncode == 0, done.stderr
    done = command("sample.py", "ckpt=own", "trust=my_lab", "n=4", "out=ddim", "sampler=ddim", "steps=5", cwd=house)
    assert done.returncode == 0, done.stderr
    mine, ddim = (np.load(house / name / "samples.npz")["samples"] for name in ("mine", "ddim"))
    np.testing.assert_allclose(mine, ddim, rtol=1e-5, atol=1e-6)
