"""How the inputs of a mixer start."""

import torch

from nestlearn.layers.streams import Streams
from nestlearn.models import HopeConfig, HopeLM


def test_a_fresh_memory_returns_what_followed():
    torch.manual_seed(0)
    width, half = 128, 16
    first = torch.randn(64, half, width)
    shuffled = torch.stack([row[torch.randperm(half)] for row in first])
    order = (shuffled.unsqueeze(2) == first.unsqueeze(1)).all(-1).int().argmax(-1)  # where each token stood before
    streams = Streams(width, 2, streams=3)
    u, _ = streams(torch.cat([first, shuffled], dim=1), None)
    q, k = streams.split(u)[:2]
    scores = (q.transpose(1, 2).flatten(2)[:, half:] @ k.transpose(1, 2).flatten(2)[:, :half].mT).argmax(-1)
    known = order < half - 1
    share = (scores == order + 1)[known].double().mean()
    assert share > 0.5, share  # by chance 1 / 16


def test_models_keep_the_start_of_their_streams():
    for mixer in ("self_modifying_titans", "titans", "gated_delta_net", "attention"):
        model = HopeLM(HopeConfig(vocab_size=8, dim=32, depth=1, heads=2, mixer=mixer))
        streams = next(module for module in model.modules() if isinstance(module, Streams))
        q, k, v, *_ = streams.projection.weight.split(32)
        assert torch.equal(q, k)
        assert not torch.equal(q, v)
        taps = streams.convolution.weight
        assert taps[-1, :32].mean() > 0.2
        assert taps[-2, 32:64].mean() > 0.2
        assert abs(taps[:, 64:].mean()) < 0.1


def test_a_convolution_of_one_token_has_no_token_before():
    taps = Streams(32, 2, streams=2, conv_width=1).convolution.weight
    assert (taps.mean() > 0.4).item()
