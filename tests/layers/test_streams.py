"""How the inputs of a mixer start."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.layers.streams import Streams
from nestlearn.models import HopeConfig, HopeLM


def likest_key(streams: Streams, x: Tensor, known: int) -> Tensor:
    """Which of the first `known` tokens has the key most like each later query, per head: (B, H, T - known)."""
    u, _ = streams(x, None)
    q, k = F.normalize(streams.split(u)[:2], dim=-1)
    return (q[:, :, known:] @ k[:, :, :known].mT).argmax(-1)


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (64, 2)])
def test_a_fresh_query_finds_the_key_after_its_token(width: int, heads: int) -> None:
    torch.manual_seed(0)
    first = torch.randn(64, 16, width)
    order = torch.rand(64, 16).argsort(1)  # where each token of the second half stood before
    again = first.gather(1, order.unsqueeze(-1).expand_as(first))
    found = likest_key(Streams(width, heads, streams=3), torch.cat([first, again], dim=1), 16)
    has_follower = (order < 15).unsqueeze(1).expand_as(found)
    share = (found == order.unsqueeze(1) + 1)[has_follower].double().mean().item()
    assert share > 6 / 16, share  # by chance 1 / 16


@pytest.mark.parametrize(
    "mixer", ["self_modifying_titans", "titans", "gated_delta_net", "delta_net", "linear_attention", "attention"]
)
def test_models_keep_the_start_of_their_streams(mixer: str) -> None:
    dim = 64
    model = HopeLM(HopeConfig(vocab_size=8, dim=dim, depth=1, heads=2, mixer=mixer))  # type: ignore[arg-type]
    streams = next(module for module in model.modules() if isinstance(module, Streams))
    q, k, v = streams.projection.weight.split(dim)[:3]
    assert torch.equal(q, k)
    assert not torch.equal(q, v)
    assert streams.projection.weight.std().item() == pytest.approx(0.5 * dim**-0.5, rel=0.1)
    lead = torch.zeros(4, streams.count * dim)
    lead[-1, :dim] = lead[-2, dim : 2 * dim] = 0.4  # 0.8 / sqrt(4)
    rest = streams.convolution.weight - lead
    assert rest.abs().max() <= 0.5
    assert rest.unflatten(-1, (streams.count, dim)).mean(-1).abs().max() < 0.2  # std of such a mean: 0.036


def test_a_convolution_of_one_token_has_no_lead() -> None:
    taps = Streams(64, 2, streams=2, conv_width=1).convolution.weight
    assert taps.mean().abs() < 0.25  # of 128, uniform in +-1


def test_a_mixer_needs_queries_and_keys() -> None:
    with pytest.raises(ValueError, match="streams: expected at least 2"):
        Streams(64, 2, streams=1)
