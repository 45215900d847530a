"""Weights in fewer bits: what each encoding keeps of a matrix, and that it is the published one."""

import pytest
import torch
from torch import Tensor

from mmdit.nn.encodings import BLOCK, ENCODINGS, QUANTILES, decode_nf4, encode_nf4

# Two rows of 64 numbers as bitsandbytes 0.50.2 encodes them in nf4, and the sums of what it decodes
# and of its squares.
CUBES = "001112223344455566666777777777777777777777788888999aabbccddeeeff"
WAVE = "777777777777777777778876678876668986568997457ab8436bda313bed4019"
SUMS = [[-0.09225578606128693, 10.028075443038167], [-0.746138870716095, 3.196874372833073]]


def published_matrix() -> Tensor:
    cubes = torch.linspace(-1, 1, 64) ** 3
    return torch.stack([cubes, torch.arange(64).float().sin() * torch.logspace(-2, 0, 64)])


def test_nf4_is_the_published_one():
    codes, scale = encode_nf4(published_matrix())
    assert [bytes(row.tolist()).hex() for row in codes] == [CUBES, WAVE]
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.8347146511077881]]))
    values = decode_nf4(codes, scale, torch.float64)
    sums = torch.stack([values.sum(1), values.square().sum(1)], 1)
    torch.testing.assert_close(sums, torch.tensor(SUMS, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_nf4_has_the_quantiles_of_a_normal_distribution():
    """Seven below zero and eight above it, evenly spaced in probability."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    below, above = (torch.linspace(last, 0.5, n, dtype=torch.float64)[:-1] for n in (8, 9))
    quantiles = torch.special.ndtri(torch.cat([1 - below, torch.tensor([0.5]), above.flip(0)]))
    torch.testing.assert_close(
        torch.tensor(QUANTILES, dtype=torch.float64), quantiles / quantiles[-1], rtol=0, atol=1e-6
    )


def test_bitsandbytes_has_the_same_codes_scales_and_numbers():
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 640, generator=generator) * torch.logspace(-3, 3, 96)[:, None]
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    codes, scale = encode_nf4(weight)
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert torch.equal(scale.flatten(), state.absmax)
    decoded = functional.dequantize_4bit(theirs, state)
    assert torch.equal(decode_nf4(codes, scale, torch.float32), decoded)


def of_many_sizes(columns: int) -> Tensor:
    """Return rows of which the first has numbers of 1e-6, the last of 1e6, and one is zero."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(33, columns, generator=generator) * torch.logspace(-6, 6, 33)[:, None]
    weight[3] = 0
    return weight


@pytest.mark.parametrize("columns", [2, 24, 64, 150])
def test_nf4_takes_the_nearest_number_of_each_block(columns):
    weight = of_many_sizes(columns)
    codes, scale = encode_nf4(weight)
    blocks = -(-columns // BLOCK)
    assert codes.dtype == torch.uint8 and codes.shape == (33, columns // 2)
    assert scale.dtype == torch.float32 and scale.shape == (33, blocks)
    back = decode_nf4(codes, scale, torch.float32)
    for first in range(0, columns, BLOCK):
        part, kept = weight[:, first : first + BLOCK], back[:, first : first + BLOCK]
        largest = part.abs().amax(1, keepdim=True)
        candidates = torch.tensor(QUANTILES) * largest[..., None]
        nearest = (candidates - part[..., None]).abs().amin(2)
        assert torch.all((kept - part).abs() <= nearest + 1e-6 * largest)
    assert back[3].eq(0).all()


def test_an_odd_number_of_columns_is_said():
    with pytest.raises(ValueError, match="two columns into a byte, but a matrix has 7 columns"):
        encode_nf4(torch.ones(2, 7))


def test_int8_rounds_to_the_nearest_127th_of_a_row():
    weight = of_many_sizes(50)
    codes, scale = ENCODINGS["int8"].encode(weight)
    assert codes.dtype == torch.int8 and scale.shape == (33, 1)
    back = ENCODINGS["int8"].decode(codes, scale, torch.float32)
    assert torch.all((back - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001)
    torch.testing.assert_close(back.abs().amax(1), weight.abs().amax(1), rtol=1e-6, atol=0)
    assert (codes.abs().amax(1) == 127).sum() == 32 and codes[3].eq(0).all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_decoded_is_rounded_once(name, dtype):
    codes, scale = ENCODINGS[name].encode(torch.randn(16, 96))
    exact = ENCODINGS[name].decode(codes, scale, torch.float64)
    assert torch.equal(ENCODINGS[name].decode(codes, scale, dtype), exact.float().to(dtype))
