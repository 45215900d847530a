"""Every range of pixels leads back to where it came from."""

import torch

from mmdit import pixels


def test_every_way_from_unit_pixels_leads_back():
    every = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    unit = pixels.to_unit(every)
    assert unit.dtype == torch.float32 and (unit.min(), unit.max()) == (0, 1)
    assert torch.equal(pixels.to_uint8(unit), every)
    assert torch.equal(pixels.to_uint8(pixels.from_signed(pixels.to_signed(unit))), every)
    for statistics in (pixels.IMAGENET, pixels.CLIP):
        standard = pixels.Standard(statistics, "cpu")
        assert torch.equal(pixels.to_uint8(standard.to_unit(standard.to_standard(unit))), every)
        grey = torch.tensor(statistics[0]).view(3, 1, 1)
        assert torch.equal(standard.to_standard(grey), torch.zeros(3, 1, 1))


def test_what_lies_outside_is_clamped():
    outside = torch.tensor([-3.0, -1e-9, 1.5])
    assert pixels.to_uint8(outside).tolist() == [0, 0, 255]
    assert pixels.from_signed(outside * 2).tolist() == [0, 0.5, 1]
