"""The convolutions on samples against transformers' HuBERT and a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiot.features import Waveform

LENGTHS = [4000, 2000, 400, 2719]


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 0.1 * torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.02


def test_the_published_sizes_are_the_defaults():
    features = Waveform()
    assert (features.win_length, features.hop_length, features.embed_dim) == (400, 320, 512)
    assert features.num_tokens(16000) == 49  # wav2vec 2.0, section 4.2: 49 Hz
    assert features.num_samples(49) == 15760
    assert features.frame_centers(3).tolist() == [200, 520, 840]
    weights = sum(parameter.numel() for parameter in Waveform(norm="group").convolutions.parameters())
    assert weights == 512 * 10 + 4 * 512 * 512 * 3 + 2 * 512 * 512 * 2


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_it_computes_what_huberts_feature_extractor_does(norm):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        conv_dim=(16,) * 7, feat_extract_norm=norm, conv_bias=norm == "layer", num_hidden_layers=1, hidden_size=16,
        num_attention_heads=2, intermediate_size=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    theirs = transformers.HubertModel(config).eval()
    ours = Waveform(channels=16, norm=norm)
    layers = theirs.feature_extractor.conv_layers
    pairs = [
        *zip(ours.convolutions, (layer.conv for layer in layers), strict=True),
        *zip(ours.norms, (layer.layer_norm for layer in layers if hasattr(layer, "layer_norm")), strict=True),
        (ours.output_norm, theirs.feature_projection.layer_norm),
    ]
    with torch.no_grad():
        for own, other in pairs:
            for parameter, value in zip(own.parameters(), other.parameters(), strict=True):
                parameter.copy_(value.normal_())
    prepare = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    waveforms = noise()
    lengths = [ours.num_samples(ours.num_tokens(length)) for length in LENGTHS]  # theirs hears what fills no window, too
    tokens, counts = ours(waveforms, torch.tensor(lengths))
    valid = torch.arange(tokens.shape[1]) < counts[:, None]
    actual = ours.embed(tokens, valid)
    for row, (length, count) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        heard = prepare(waveforms[row, :length].numpy(), sampling_rate=16000, return_tensors="pt").input_values
        expected = theirs.feature_projection.layer_norm(theirs.feature_extractor(heard).transpose(1, 2))
        assert expected.shape[1] == count
        torch.testing.assert_close(actual[row, :count], expected[0], atol=1e-4, rtol=1e-4)


def test_windows_are_joined_to_the_waveform_that_they_are_of():
    features = Waveform(channels=4, normalize=False)
    tokens, counts = features(noise(), torch.tensor(LENGTHS))
    valid = torch.arange(tokens.shape[1]) < counts[:, None]
    waveforms = features.joined(tokens, valid)
    for row, count in enumerate(counts.tolist()):
        samples = 320 * count + 80
        assert torch.equal(waveforms[row, :samples], noise()[row, :samples])
        assert not waveforms[row, samples:].any()
    assert torch.equal(features.joined(tokens[:1]), waveforms[:1])


def test_each_utterance_gets_mean_0_and_variance_1_over_its_own_samples():
    features = Waveform(channels=4)
    whole, _ = features(noise(torch.float64), torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        samples = noise(torch.float64)[row, :length].numpy()
        expected = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        count = features.num_tokens(length)
        windows = np.stack([expected[320 * t : 320 * t + 400] for t in range(count)])
        np.testing.assert_allclose(whole[row, :count].numpy(), windows, atol=1e-12)
        assert not whole[row, count:].any()


def layer_norm(values: list[torch.Tensor], norm: torch.nn.LayerNorm) -> list[torch.Tensor]:
    rows = []
    for value in values:
        centred = value - value.mean()
        rows.append(centred / (centred.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias)
    return rows


def test_values_and_gradients_are_those_of_a_loop_over_windows():
    torch.manual_seed(0)
    features = Waveform(channels=3, kernels=[4, 3, 2], strides=[3, 2, 2], grad_scale=1.0, normalize=False).double()
    assert (features.win_length, features.hop_length) == (1 + 3 + 2 * 3 + 1 * 6, 12)
    lengths = torch.tensor([60, 41])
    waveforms = noise(torch.float64)[:2, :60]
    tokens, counts = features(waveforms, lengths)
    valid = torch.arange(tokens.shape[1]) < counts[:, None]
    features.embed(tokens, valid)[valid].sin().sum().backward()
    actual = [parameter.grad.clone() for parameter in features.parameters()]
    features.zero_grad()
    rows = []
    for row, count in enumerate(counts.tolist()):
        for token in range(count):
            hidden = list(waveforms[row, 12 * token : 12 * token + 16, None])  # one vector per time
            for convolution, norm, stride in zip(features.convolutions, features.norms, (3, 2, 2), strict=True):
                kernel = convolution.kernel_size[0]
                outputs = []
                for start in range(0, len(hidden) - kernel + 1, stride):
                    terms = [convolution.weight[:, :, tap] @ hidden[start + tap] for tap in range(kernel)]
                    outputs.append(sum(terms) + convolution.bias)
                hidden = [torch.nn.functional.gelu(value) for value in layer_norm(outputs, norm)]
            assert len(hidden) == 1
            rows += layer_norm(hidden, features.output_norm)
    torch.testing.assert_close(features.embed(tokens, valid)[valid], torch.stack(rows), atol=1e-12, rtol=0)
    torch.stack(rows).sin().sum().backward()
    for parameter, value in zip(features.parameters(), actual, strict=True):
        torch.testing.assert_close(parameter.grad, value, atol=1e-12, rtol=0)
