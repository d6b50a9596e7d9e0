"""Mixed batches of a classifier against the papers' formulas, on images that tell where they are.

Image i has the value i everywhere and is alone in its class.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from detmix.training import ImageMixingConfig
from detmix.training.image_mixing import build_batch_mix

BATCH, CLASSES, SIZE = 5, 9, 20


def unique_batch():
    images = torch.arange(1.0, BATCH + 1)[:, None, None, None].expand(BATCH, 3, SIZE, SIZE)
    return images.clone(), torch.tensor([4, 0, 8, 2, 5])


def mix_batch(mix, seed, **options):
    images, labels = unique_batch()
    torch.manual_seed(seed)
    mixed, targets = build_batch_mix(mix, ImageMixingConfig(**options), CLASSES)(images, labels)
    original, _ = unique_batch()
    assert torch.equal(images, original)  # the input stays as it is
    return mixed, targets


def expected_targets(lam):
    """Return λ for an image's own class and 1 - λ for its partner's."""
    _, labels = unique_batch()
    own, partner = F.one_hot(labels, CLASSES), F.one_hot(labels.roll(1), CLASSES)
    return lam * own + (1 - lam) * partner


def own_ratio(targets):
    """Return the λ that all images of a batch share."""
    _, labels = unique_batch()
    ratios = targets.gather(1, labels[:, None])
    assert ratios.min() == ratios.max()
    return float(ratios[0])


@pytest.mark.parametrize("seed", range(20))
def test_mixup_blends_pixels_and_targets_alike(seed):
    images, _ = unique_batch()
    mixed, targets = mix_batch("mixup", seed, mixup_alpha=1.0)
    lam = own_ratio(targets)
    assert 0 <= lam <= 1
    torch.testing.assert_close(targets, expected_targets(lam))
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.roll(1, 0))


@pytest.mark.parametrize("seed", range(40))
def test_cutmix_counts_the_pixels_that_were_pasted(seed):
    images, _ = unique_batch()
    mixed, targets = mix_batch("cutmix", seed)
    is_own = mixed == images
    torch.testing.assert_close(mixed[~is_own], images.roll(1, 0)[~is_own], rtol=0, atol=0)
    kept = is_own[0, 0]
    assert (is_own == kept).all()  # one rectangle for the whole batch, and for all channels
    pasted = ~kept
    rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
    assert pasted.sum() == rows * columns  # a rectangle indeed
    lam = float(kept.double().mean())
    torch.testing.assert_close(targets, expected_targets(lam))


def test_cutmix_takes_the_clipped_area_not_the_drawn_ratio(monkeypatch):
    drawn = 0.5  # a square of 14 pixels, where the border cuts nothing off
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda *_: torch.tensor(drawn))
    ratios = []
    for seed in range(40):
        mixed, targets = mix_batch("cutmix", seed)
        ratios.append(own_ratio(targets))
        kept = (mixed == unique_batch()[0])[0, 0]
        assert ratios[-1] == pytest.approx(float(kept.float().mean()))
    whole = 1 - 14**2 / SIZE**2
    assert min(ratios) == pytest.approx(whole)
    assert sum(ratio > whole + 0.05 for ratio in ratios) > 10


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_ratios_are_of_the_beta_distribution(alpha):
    """E[λ(1 - λ)] is α / (2 (2α + 1)) for Beta(α, α)."""
    ratios = [own_ratio(mix_batch("mixup", s, mixup_alpha=alpha)[1]) for s in range(1500)]
    products = torch.tensor([ratio * (1 - ratio) for ratio in ratios])
    assert float(products.mean()) == pytest.approx(alpha / (2 * (2 * alpha + 1)), abs=0.01)


def test_cutmix_has_its_own_alpha():
    spread = [
        torch.tensor([own_ratio(mix_batch("cutmix", s, cutmix_alpha=a)[1]) for s in range(200)])
        for a in (0.05, 50.0)
    ]
    assert spread[0].std() > 2 * spread[1].std()


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "mixup+cutmix"])
def test_p_is_the_chance_of_a_batch(mix):
    images, labels = unique_batch()
    untouched = 0
    for seed in range(400):
        mixed, targets = mix_batch(mix, seed, p=0.25)
        if targets.ndim == 1:
            assert torch.equal(mixed, images)
            assert torch.equal(targets, labels)
            untouched += 1
    assert untouched / 400 == pytest.approx(0.75, abs=0.08)


def test_both_ways_in_turn():
    images, _ = unique_batch()
    num_cutmix = 0
    for seed in range(300):
        mixed, targets = mix_batch("mixup+cutmix", seed, mixup_alpha=1.0)
        is_blend = ((mixed != images) & (mixed != images.roll(1, 0))).any()
        num_cutmix += not is_blend
        torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))
    assert num_cutmix / 300 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("mix", ["none", "cutout"])
def test_nothing_to_do_on_the_batch(mix):
    assert build_batch_mix(mix, ImageMixingConfig(), CLASSES) is None


def test_it_is_a_function_of_torchs_random_state():
    for mix in ("mixup", "cutmix", "mixup+cutmix"):
        for first, second in zip(mix_batch(mix, 3), mix_batch(mix, 3), strict=True):
            assert torch.equal(first, second)


def test_the_loss_of_soft_targets_is_the_papers_sum():
    """The official code adds λ and 1 - λ times the losses of the two labels."""
    _, labels = unique_batch()
    _, targets = mix_batch("mixup", 0, mixup_alpha=1.0)
    lam = own_ratio(targets)
    scores = torch.randn(BATCH, CLASSES)
    both = lam * F.cross_entropy(scores, labels) + (1 - lam) * F.cross_entropy(
        scores, labels.roll(1)
    )
    torch.testing.assert_close(F.cross_entropy(scores, targets), both)
