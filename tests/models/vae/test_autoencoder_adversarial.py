"""The autoencoder's adversarial term: the weight that balances it, the warm-up, the adversarial loop."""

import pytest
import torch

from genai.core.errors import UserError
from genai.core.protocols import AdversarialModel, Codec
from genai.losses.adversarial import Hinge, Relativistic
from genai.models.vae.adversarial import AdversarialAutoencoder, PatchDiscriminator, balance, last_layer
from genai.models.vae.nets import MapDecoder, MapEncoder


def model(**arguments):
    torch.manual_seed(0)
    shape, latent_shape = [1, 8, 8], [2, 2, 2]
    encoder, decoder = MapEncoder(shape, latent_shape, 4, 8, [1, 2]), MapDecoder(shape, latent_shape, 8, [1, 2])
    arguments = {"loss": Hinge(), **arguments}
    return AdversarialAutoencoder(
        "image", shape, latent_shape, encoder, decoder, PatchDiscriminator(shape, 8, 2), **arguments
    )


def batch(n=6):
    torch.manual_seed(1)
    return {"image": torch.rand(n, 1, 8, 8) * 2 - 1}


@pytest.mark.parametrize("loss", [Hinge(), Relativistic()], ids=["hinge", "relativistic"])
def test_both_terms_pull_at_the_last_layer_as_strongly(loss):
    m, b = model(loss=loss, adversarial_weight=1.0, kl_weight=0.3), batch()
    fake = m.generate(b, 0)
    losses, layer = m.generator_loss(b, fake, 0), last_layer(m.decoder)
    assert layer is m.decoder.net[-1].weight
    plain, _ = m.terms(b["image"], fake["fake"], fake["mean"], fake["log_variance"])
    whole, ours = (torch.autograd.grad(t, layer, retain_graph=True)[0] for t in (losses.total, plain))
    assert (whole - ours).norm().item() == pytest.approx(ours.norm().item(), rel=0.02)  # but for the 1e-4
    adversarial, weight = losses.logs["adversarial_loss"][0], losses.logs["adaptive_weight"][0]
    assert losses.total.item() == pytest.approx((plain + weight * adversarial).item(), rel=1e-5)
    assert m.generate(b, 0)["fake"].requires_grad and isinstance(m, AdversarialModel) and isinstance(m, Codec)


def test_the_weight_is_bounded_and_constant():
    w = torch.ones(3, requires_grad=True)
    assert balance((3 * w).sum(), (6 * w).sum(), w).item() == pytest.approx(3 / (6 + 1e-4 / 3**0.5), rel=1e-5)
    assert balance((9 * w).sum(), (0 * w).sum(), w).item() == 1e4
    assert not balance((3 * w).sum(), (w**2).sum(), w).requires_grad


def test_until_its_step_the_discriminator_is_not_heard():
    m, b = model(start_step=5), batch()
    fake = m.generate(b, 4)
    held = {name: x.detach() for name, x in fake.items()}
    m.discriminator_loss(b, held, 4).total.backward()
    assert all(p.grad is None for _, p in m.discriminator_parameters())  # so that its optimiser waits too
    with pytest.raises(UserError, match=r"model.discriminator.layers=4 .* give fewer"):
        PatchDiscriminator([1, 8, 8], 8, 4)
    early, plain = (
        m.generator_loss(b, fake, 4),
        m.terms(b["image"], fake["fake"], fake["mean"], fake["log_variance"])[0],
    )
    assert early.total.item() == plain.item() and "adversarial_loss" not in early.logs
    late = m.discriminator_loss(b, held, 5)
    late.total.backward()
    assert all(p.grad is not None for _, p in m.discriminator_parameters())
    real, false = m.discriminator(b["image"]), m.discriminator(held["fake"])
    assert real.shape == (6, 1, 2, 2)
    expected = torch.relu(1 - real).mean() + torch.relu(1 + false).mean()
    assert late.total.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert m.generator_loss(b, fake, 9).total.item() == pytest.approx(plain.item(), rel=1e-5)
    both = [*m.generator_parameters(), *m.discriminator_parameters()]
    assert dict(both).keys() == dict(m.named_parameters()).keys()
