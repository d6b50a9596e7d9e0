"""Blending pixels, against a float64 formula on explicitly padded images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mixing_oracle import DEVICES, LAMS, TOLERANCE, assert_pixels, expected_pixels, make_image

from detmix.mixing import blend


class TestBlend:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("lam", LAMS)
    def test_formula_on_images_of_different_sizes(self, device, dtype, lam):
        fills = (0, 114, (7, 0, 255)) if dtype == torch.uint8 else (0, 0.5, (0.25, 0, 1))
        for fill in fills:
            for size_b in ((11, 17), (17, 11), (9, 23), (30, 40)):
                a = make_image(11, 17, dtype, seed=1, device=device)
                b = make_image(*size_b, dtype, seed=2, device=device)
                assert_pixels(blend(a, b, lam, fill), a, b, lam, fill)

    @pytest.mark.parametrize("sizes", [((700, 300), (300, 700)), ((500, 375), (120, 500))])
    def test_formula_on_uint8_images_of_many_strips(self, sizes):
        a, b = make_image(*sizes[0], seed=1), make_image(*sizes[1], seed=2)
        assert_pixels(blend(a, b, 0.37, (1, 2, 250)), a, b, 0.37, (1, 2, 250))

    def test_channels_last_in_memory(self):
        a, b = make_image(40, 30, seed=1), make_image(30, 40, seed=2)
        a_last, b_last = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (a, b))
        mixed = blend(a_last, b_last, 0.3)
        assert torch.equal(mixed, blend(a, b, 0.3))
        assert mixed.permute(1, 2, 0).is_contiguous()
        assert torch.equal(blend(a_last, b, 0.3), blend(a, b, 0.3))

    def test_non_contiguous_images(self):
        a, b = make_image(40, 30, seed=1).flip(2)[:, ::2], make_image(64, 64, seed=2)[:, 3:, 5:50]
        assert_pixels(blend(a, b, 0.8), a, b, 0.8)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_any_number_of_channels(self, channels):
        a, b = make_image(5, 9, channels=channels), make_image(7, 3, channels=channels, seed=1)
        assert_pixels(blend(a, b, 0.25, 9), a, b, 0.25, 9)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(("lam", "which"), [(1.0, 0), (0.0, 1)])
    def test_ratio_of_one_is_the_image_itself(self, device, dtype, lam, which):
        images = [make_image(6, 8, dtype, seed, device=device) for seed in (1, 2)]
        assert torch.equal(blend(*images, lam), images[which])

    @pytest.mark.parametrize("device", DEVICES)
    def test_uint8_is_rounded_to_nearest_by_hand(self, device):
        a = torch.tensor([[[0, 1, 2, 3, 10, 200, 255, 255]]], dtype=torch.uint8, device=device)
        b = torch.tensor([[[0, 0, 0, 0, 20, 100, 0, 254]]], dtype=torch.uint8, device=device)
        # 0, 0.25, 0.5 (either), 0.75, 17.5 (either), 125, 63.75, 254.25
        quarter = blend(a, b, 0.25).flatten().tolist()
        assert quarter[:2] + quarter[3:4] + quarter[5:] == [0, 0, 1, 125, 64, 254]
        assert quarter[2] in (0, 1)
        assert quarter[4] in (17, 18)
        # 0, 0.9, 1.8, 2.7, 11, 190, 229.5 (either), 254.9
        most = blend(a, b, 0.9).flatten().tolist()
        assert most[:6] + most[7:] == [0, 1, 2, 3, 11, 190, 255]
        assert most[6] in (229, 230)

    @pytest.mark.parametrize("lam", [0.5, 0.25, 0.1, 2 / 3, 0.9])
    def test_uint8_rounding_has_no_bias(self, lam):
        values = torch.arange(256, dtype=torch.uint8)
        a, b = values.repeat(256).reshape(1, 256, 256), values.repeat_interleave(256)
        b = b.reshape(1, 256, 256)
        error = blend(a, b, lam).double().numpy() - expected_pixels(a, b, lam, 0)
        assert np.abs(error).max() <= 0.5 + 1e-4
        # Rounding ties up would be +0.25 at λ = 0.5 and +0.05 at 0.9, truncation -0.25 and more.
        assert abs(error.mean()) < 1e-2

    def test_uint8_fill_is_rounded_to_nearest(self):
        a, b = make_image(2, 4), make_image(4, 2)
        corner = blend(a, b, 0.5, (123.68, 116.28, 103.53))[:, -1, -1]
        assert corner.tolist() == [124, 116, 104]

    def test_gradient_reaches_both_images(self):
        a, b = (torch.rand(3, 4, 4, requires_grad=True) for _ in range(2))
        blend(a, b, 0.3).sum().backward()
        torch.testing.assert_close(a.grad, torch.full_like(a, 0.3))
        torch.testing.assert_close(b.grad, torch.full_like(b, 0.7))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("fill", [-1, 256, 255.9, math.nan, (0, 0, 300), (1, 2), (1, 2, 3, 4)])
    @pytest.mark.parametrize("size", [4, 6])
    def test_fill(self, device, fill, size):
        images = [make_image(4, 4, device=device), make_image(size, size, device=device)]
        with pytest.raises(ValueError, match=r"fill must be"):
            blend(*images, 0.5, fill)
