"""`DetectionCutMix`: the paper's rectangle, and wherever mixers serve."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from mixing_oracle import DEVICES, assert_same_target
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from detmix import DetectionCutMix, MixedDataset, cutmix
from detmix.mixing import Cut, DetectionMixer, MixParams, sample_seed

CONTEXTS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


def target_of(*boxes):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "image_id": 1}


class TestRectangle:
    @pytest.mark.parametrize("size", [(20, 30), (7, 5), (375, 500), (1, 1)])
    def test_is_torchvision_s_for_the_same_draws(self, size):
        height, width = size
        batch, transform = torch.zeros(2, 3, *size), v2.CutMix(num_classes=2)
        for seed in range(200):
            torch.manual_seed(seed)
            expected = transform.make_params([batch])["box"]
            torch.manual_seed(seed)
            lam = float(transform._dist.sample(()))
            x, y = (int(torch.randint(side, (1,))) for side in (width, height))
            assert Cut(lam, (x + 0.5) / width, (y + 0.5) / height).rectangle(size) == expected

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
    def test_areas_are_distributed_as_torchvision_s(self, alpha):
        size, draws = (40, 60), 3000
        torch.manual_seed(0)
        transform, batch = v2.CutMix(alpha=alpha, num_classes=2), torch.zeros(2, 3, *size)
        theirs = [1 - transform.make_params([batch])["lam_adjusted"] for _ in range(draws)]
        mix, rng = DetectionCutMix(alpha=alpha), random.Random(0)
        ours = []
        for _ in range(draws):
            x1, y1, x2, y2 = mix.draw_pair(rng).rectangle(size)
            ours.append((x2 - x1) * (y2 - y1) / (size[0] * size[1]))
        error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / draws)
        assert statistics.fmean(ours) == pytest.approx(statistics.fmean(theirs), abs=4 * error)
        # Kolmogorov and Smirnov: a distance beyond 2.2 sqrt(2 / n) comes once in 10,000.
        below = [sum(value <= level / 50 for value in ours) / draws for level in range(51)]
        other = [sum(value <= level / 50 for value in theirs) / draws for level in range(51)]
        distance = max(abs(a - b) for a, b in zip(below, other, strict=True))
        assert distance < 2.2 * math.sqrt(2 / draws)

    def test_lies_within_what_both_images_cover(self):
        mix = DetectionCutMix(p=1.0)
        a, b = torch.zeros(3, 10, 40), torch.ones(3, 30, 8)
        rng, covered = random.Random(1), torch.zeros(10, 40)
        for _ in range(300):
            image, _ = mix.mix_pair((a, target_of()), (b, target_of()), mix.draw_pair(rng))
            assert image.shape == a.shape
            covered += image[0]
        assert (covered[:, :8] > 0).all()
        assert (covered[:, 8:] == 0).all()


class Plain(Dataset):
    """Sample i is an image full of i with one object that covers it all, of label i + 1."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        height, width = 16 + index % 3, 24 - index % 4
        image = torch.full((3, height, width), index, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0.0, width, height]])
        return image, {"boxes": boxes, "labels": torch.tensor([index + 1]), "image_id": index}


def samples_of(num=12, device="cpu"):
    samples = [Plain()[index] for index in range(num)]
    return [
        (
            image.to(device),
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()},
        )
        for image, target in samples
    ]


def pasted_share(image, target):
    """The share of pixels that are not the sample's own."""
    return (image[0] != target["image_id"]).double().mean().item()


class TestMixer:
    def test_is_a_mixer_that_says_its_settings(self):
        mix = DetectionCutMix(alpha=2.0, p=0.25, min_visibility=0.2, epochs=5, off_epochs=2)
        assert isinstance(mix, DetectionMixer)
        text = "alpha=2.0, min_visibility=0.2, p=0.25, epochs=5, off_epochs=2"
        assert repr(mix) == f"DetectionCutMix({text})"

    @pytest.mark.parametrize("device", DEVICES)
    def test_transform_is_cutmix_of_the_pairs_it_is_given(self, device):
        samples = samples_of(3, device)
        cut = Cut(0.4, 0.3, 0.7)
        mixed = DetectionCutMix(min_visibility=0.3).transform(
            samples, [MixParams(2, cut), None, None]
        )
        # the third sample covers 18 x 22 pixels, the first 16 x 24
        rectangle = cut.rectangle((16, 22))
        expected = cutmix(*samples[0], *samples[2], rectangle, min_visibility=0.3)
        assert torch.equal(mixed[0][0], expected[0])
        assert_same_target(mixed[0][1], expected[1])
        assert mixed[1][0] is samples[1][0]
        assert mixed[1][1]["box_weights"].tolist() == [1.0]

    @pytest.mark.parametrize("device", DEVICES)
    def test_weights_are_the_shares_of_the_pixels(self, device):
        mix = DetectionCutMix(p=1.0, min_visibility=0.0)
        generator = torch.Generator().manual_seed(0)
        mixed_once = 0
        for _ in range(5):
            images, targets = mix(samples_of(12, device), generator=generator)
            for image, target in zip(images, targets, strict=True):
                own = target["box_weights"][target["labels"] == target["image_id"] + 1]
                assert own.sum().item() == pytest.approx(1 - pasted_share(image, target), abs=1e-6)
                mixed_once += len(target["boxes"]) == 2
        assert mixed_once > 30

    def test_one_tensor_in_one_tensor_out(self):
        images = torch.rand(4, 3, 16, 24)
        stacked, targets = DetectionCutMix(p=1.0)(images, [target_of((0, 0, 24, 16))] * 4)
        assert stacked.shape == images.shape
        assert all(len(target["boxes"]) for target in targets)

    def test_p_0_leaves_the_batch_and_adds_weights(self):
        samples = samples_of()
        images, targets = DetectionCutMix(p=0.0)(samples)
        for (image, target), mixed, mixed_target in zip(samples, images, targets, strict=True):
            assert mixed is image
            assert_same_target(mixed_target, {**target, "box_weights": torch.ones(1)})

    def test_p_is_the_share_of_mixed_samples(self):
        mix, generator = DetectionCutMix(p=0.3), torch.Generator().manual_seed(0)
        drawn = [param for _ in range(400) for param in mix.make_params(10, generator)]
        share = sum(param is not None for param in drawn) / len(drawn)
        assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))

    def test_seeds_decide_for_each_sample_whatever_the_order_of_the_batch(self):
        mix, seeds = DetectionCutMix(p=0.5), [sample_seed(0, 0, index) for index in range(9)]
        params = mix.make_params(9, seeds=seeds)
        assert 0 < sum(param is None for param in params) < 9
        order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
        shuffled = mix.make_params(9, seeds=[seeds[index] for index in order])
        for place, index in enumerate(order):
            assert (shuffled[place] is None) == (params[index] is None)
            if params[index] is not None:
                assert shuffled[place].how == params[index].how
                assert order[shuffled[place].partner] == params[index].partner

    def test_pair_that_does_not_match_is_named(self):
        samples = samples_of(2)
        samples[1] = (samples[1][0].float(), samples[1][1])
        with pytest.raises(ValueError, match=r"mixing sample \d .* with sample \d .*dtype"):
            DetectionCutMix(p=1.0)(samples)


class TestLoader:
    @pytest.mark.parametrize("context", CONTEXTS)
    def test_schedule_reaches_persistent_workers(self, context):
        mix = DetectionCutMix(p=1.0, epochs=3, off_epochs=1)
        loader = DataLoader(
            Plain(),
            batch_size=6,
            collate_fn=mix,
            num_workers=2,
            persistent_workers=True,
            multiprocessing_context=context,
        )
        found = []
        for epoch in range(3):
            mix.set_epoch(epoch)
            batches = [zip(*batch, strict=True) for batch in loader]
            found.append(sum(pasted_share(*sample) > 0 for batch in batches for sample in batch))
        assert found[2] == 0
        assert min(found[:2]) >= 6  # some rectangles are empty

    def test_mixed_dataset_is_a_function_of_seed_epoch_and_index(self):
        mixed = MixedDataset(Plain(), DetectionCutMix(p=0.7), seed=1)
        mixed.set_epoch(2)
        samples = [mixed[index] for index in range(12)]
        shares = [pasted_share(*sample) for sample in samples]
        assert len({share for share in shares if share}) >= 5
        assert 0.0 in shares
        torch.manual_seed(4)  # which must not matter
        for index in reversed(range(12)):
            image, target = mixed[index]
            assert torch.equal(image, samples[index][0])
            assert_same_target(target, samples[index][1])
        mixed.set_epoch(3)
        assert [pasted_share(*mixed[index]) for index in range(12)] != shares

    def test_mixed_dataset_uses_the_partner_it_draws(self):
        plain = Plain()
        mixed = MixedDataset(plain, DetectionCutMix(p=1.0), seed=1)
        for index in range(12):
            partner, cut = mixed.draw_params(index)
            assert partner != index
            common = [
                min(s) for s in zip(plain[index][0].shape, plain[partner][0].shape, strict=True)
            ]
            rectangle = cut.rectangle((common[1], common[2]))
            expected = cutmix(*plain[index], *plain[partner], rectangle)
            assert torch.equal(mixed[index][0], expected[0])
            assert_same_target(mixed[index][1], expected[1])
