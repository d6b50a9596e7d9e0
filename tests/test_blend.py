"""Details of blended pixels: rounding, and the order in memory."""

from __future__ import annotations

import pytest
import torch
from mixing_oracle import DEVICES, assert_pixels, expected_pixels, make_image

from detmix import cutmix
from detmix.mixing import blend


class TestBlend:
    def test_channels_last_in_memory(self):
        a, b = make_image(40, 30, seed=1), make_image(30, 40, seed=2)
        a_last, b_last = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (a, b))
        mixed = blend(a_last, b_last, 0.3)
        assert torch.equal(mixed, blend(a, b, 0.3))
        assert mixed.permute(1, 2, 0).is_contiguous()
        assert torch.equal(blend(a_last, b, 0.3), blend(a, b, 0.3))
        assert cutmix(a_last, {}, b, {}, (0, 0, 5, 5))[0].stride() == a_last.stride()

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
        mixed = blend(a, b, lam)
        assert_pixels(mixed, a, b, lam)
        error = mixed.double().numpy() - expected_pixels(a, b, lam, 0)
        # Rounding ties up would be +0.25 at λ = 0.5 and +0.05 at 0.9, truncation -0.25 and more.
        assert abs(error.mean()) < 2e-2

    def test_uint8_fill_is_rounded_to_nearest(self):
        a, b = make_image(2, 4), make_image(4, 2)
        corner = blend(a, b, 0.5, (123.68, 116.28, 103.53))[:, -1, -1]
        assert corner.tolist() == [124, 116, 104]
