from __future__ import annotations

import inspect
import os
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torchaudio.compliance import kaldi

from audiot.base.parts import parameters
from audiot.features import MFCC, Features, KaldiFbank, LogMel, Spectrogram

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "features").glob("*.yaml"))
LENGTHS = [400, 559, 560, 561, 4000, 16000, 16123]


def speech_like(num_samples: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A voice gliding up through its harmonics, a chirp and noise under a slow envelope, within [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.arange(num_samples, dtype=torch.float64) / 16000
    pitch = 2 * torch.pi * (90 + 20 * seed) * (seconds + 0.2 * seconds**2)
    voice = torch.stack([torch.sin(k * pitch) / k for k in range(1, 21)]).sum(0)
    chirp = torch.sin(2 * torch.pi * (500 * seconds + 3000 * seconds**2))
    envelope = 0.6 + 0.4 * torch.sin(2 * torch.pi * 4 * seconds)
    noise = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    return ((0.1 * voice + 0.05 * chirp) * envelope + 0.02 * noise + 0.01).clamp(-1, 1).to(dtype)


def batch(lengths: list[int], dtype: torch.dtype = torch.float32, fill: float = 0.0) -> torch.Tensor:
    waveforms = torch.full((len(lengths), max(lengths)), fill, dtype=dtype)
    for i, length in enumerate(lengths):
        waveforms[i, :length] = speech_like(length, seed=i, dtype=dtype)
    return waveforms


def every_front_end() -> list[Features]:
    return [
        LogMel(stack=3, delta_order=1),
        LogMel(n_fft=512, cmvn="none"),
        KaldiFbank(),
        KaldiFbank(delta_window=9, stack=2, cmvn="none"),
        MFCC(delta_order=2),
        Spectrogram(stack=4),
        LogMel(center=True, level_db=-25.0, add_floor=True, delta_order=2),
        Spectrogram(center=True, stack=3),
        LogMel(cmvn="level", delta_order=1),
    ]


def raw(features: Features, waveform: torch.Tensor) -> torch.Tensor:
    tokens, _ = features(waveform[None])
    return tokens[0]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_kaldi_fbank_equals_torchaudio_compliance(num_samples: int) -> None:
    waveform = speech_like(num_samples)
    expected = kaldi.fbank(waveform[None], num_mel_bins=80, dither=0.0)
    actual = raw(KaldiFbank(delta_order=0, cmvn="none"), waveform)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sample_rate", [8000, 11025, 22050])
def test_kaldi_fbank_equals_torchaudio_at_other_settings(sample_rate: int) -> None:
    waveform = speech_like(9000)
    features = KaldiFbank(
        num_mel_bins=23,
        sample_rate=sample_rate,
        frame_length_ms=30.0,
        frame_shift_ms=12.5,
        low_freq=60.0,
        high_freq=-200.0,
        delta_order=0,
        cmvn="none",
    )
    expected = kaldi.fbank(
        waveform[None],
        num_mel_bins=23,
        sample_frequency=sample_rate,
        frame_length=30.0,
        frame_shift=12.5,
        low_freq=60.0,
        high_freq=-200.0,
        dither=0.0,
    )
    torch.testing.assert_close(raw(features, waveform), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_samples", LENGTHS)
@pytest.mark.parametrize("lifter", [22.0, 0.0])
def test_mfcc_equals_torchaudio_compliance(num_samples: int, lifter: float) -> None:
    waveform = speech_like(num_samples)
    expected = kaldi.mfcc(waveform[None], dither=0.0, cepstral_lifter=lifter)
    actual = raw(MFCC(cmvn="none", cepstral_lifter=lifter), waveform)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_samples", LENGTHS)
@pytest.mark.parametrize(("mel_scale", "norm"), [("htk", None), ("slaney", None), ("slaney", "slaney")])
def test_log_mel_equals_librosa(num_samples: int, mel_scale: str, norm: str | None) -> None:
    waveform = speech_like(num_samples)
    power = librosa.feature.melspectrogram(
        y=waveform.numpy(),
        sr=16000,
        n_fft=400,
        hop_length=160,
        center=False,
        power=2.0,
        n_mels=80,
        htk=mel_scale == "htk",
        norm=norm,
    )
    expected = torch.from_numpy(np.log(np.maximum(power, 1e-10)).T)
    actual = raw(LogMel(mel_scale=mel_scale, norm=norm, cmvn="none"), waveform)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_log_mel_with_160_mels_and_zero_padded_frames_equals_a_dft_by_hand() -> None:
    waveform = speech_like(2000, dtype=torch.float64)
    frames = np.stack([waveform[t * 160 : t * 160 + 400].numpy() for t in range(11)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    angles = 2 * np.pi * np.outer(np.arange(400), np.arange(513)) / 1024
    power = ((frames * window) @ np.cos(angles)) ** 2 + ((frames * window) @ np.sin(angles)) ** 2
    filters = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=160, htk=True, norm=None).astype(np.float64)
    expected = torch.from_numpy(np.log(np.maximum(power @ filters.T, 1e-10)))
    actual = raw(LogMel(n_mels=160, n_fft=1024, cmvn="none"), waveform)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_spectrogram_equals_librosa() -> None:
    waveform = speech_like(5000, dtype=torch.float64)
    power = np.abs(librosa.stft(waveform.numpy(), n_fft=400, hop_length=160, center=False)) ** 2
    expected = torch.from_numpy(np.log(np.maximum(power, 1e-10)).T)
    torch.testing.assert_close(raw(Spectrogram(cmvn="none"), waveform), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_samples", [201, 320, 559, 560, 561, 16123])
@pytest.mark.parametrize(("win_length", "n_fft"), [(400, 400), (400, 512), (399, 400), (321, 400)])
def test_centred_frames_are_those_of_an_stft_that_reflects_the_ends(num_samples: int, win_length: int, n_fft: int) -> None:
    if num_samples <= n_fft // 2:
        pytest.skip("torch.stft reflects more than the window hears")
    waveform = speech_like(num_samples, dtype=torch.float64)
    window = torch.hann_window(win_length)
    spectrum = torch.stft(waveform, n_fft, 160, win_length, window.double(), center=True, pad_mode="reflect", return_complex=True)
    expected = spectrum.abs().square().T
    options = {"n_fft": n_fft, "win_length": win_length, "center": True, "cmvn": "none"}
    assert len(expected) == Spectrogram(**options).num_frames(num_samples)
    torch.testing.assert_close(raw(Spectrogram(**options), waveform), expected.clamp(min=1e-10).log(), atol=1e-9, rtol=0)
    mels = torchaudio.transforms.MelScale(n_mels=20, n_stft=n_fft // 2 + 1)(expected.T.float()).T
    actual = raw(LogMel(n_mels=20, **options), waveform).float()
    torch.testing.assert_close(actual, mels.clamp(min=1e-10).log(), atol=1e-4, rtol=0)


def test_the_floor_is_added_where_that_is_asked_for() -> None:
    for front_end in (LogMel, Spectrogram):
        quiet = 1e-6 * speech_like(3000, dtype=torch.float64)
        power = raw(front_end(cmvn="none", floor=1e-30), quiet).exp()
        actual = raw(front_end(cmvn="none", floor=1e-10, add_floor=True), quiet)
        torch.testing.assert_close(actual, (power + 1e-10).log(), atol=1e-9, rtol=0)
        assert (power < 1e-10).any()


def test_level_db_brings_every_utterance_to_the_level_of_its_own_samples() -> None:
    lengths = [4000, 2500]
    waveforms = batch(lengths, torch.float64, fill=float("nan")) * torch.tensor([[0.01], [2.0]])
    levelled, num = Spectrogram(cmvn="none", level_db=-25.0)(waveforms, torch.tensor(lengths))
    for i, length in enumerate(lengths):
        own = waveforms[i, :length]
        scaled = own * 10 ** (-25 / 20) / own.square().mean().sqrt()
        assert scaled.square().mean().log10().item() == pytest.approx(-2.5)
        torch.testing.assert_close(levelled[i, : num[i]], raw(Spectrogram(cmvn="none"), scaled), atol=1e-6, rtol=0)
    assert raw(LogMel(level_db=-25.0, cmvn="none"), torch.zeros(1000)).isfinite().all()


@pytest.mark.parametrize("window", [3, 5, 9])
def test_deltas_equal_torchaudio_for_each_utterance_of_a_batch(window: int) -> None:
    lengths = [4000, 560, 400, 2345]  # 23, 2, 1 and 13 frames: some shorter than the window
    static, _ = LogMel(cmvn="none")(batch(lengths), torch.tensor(lengths))
    actual, num = LogMel(cmvn="none", delta_order=2, delta_window=window)(batch(lengths), torch.tensor(lengths))
    for i, frames in enumerate(num.tolist()):
        first = torchaudio.functional.compute_deltas(static[i, :frames].T, win_length=window)
        second = torchaudio.functional.compute_deltas(first, win_length=window)
        expected = torch.cat([static[i, :frames].T, first, second]).T
        torch.testing.assert_close(actual[i, :frames], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["kaldi_fbank80", "kaldi_fbank240"])
def test_kaldi_fbank_equals_the_features_of_s3prl(name: str) -> None:
    if "AUDIOT_TEST_DATA" not in os.environ:
        pytest.skip("AUDIOT_TEST_DATA is not set")
    stored = np.load(Path(os.environ["AUDIOT_TEST_DATA"]) / "s3prl" / f"{name}.npz")
    features = KaldiFbank(delta_order=2 if name.endswith("240") else 0)
    actual = raw(features, torch.from_numpy(stored["wav0"]))
    torch.testing.assert_close(actual, torch.from_numpy(stored["features0"]), atol=1e-4, rtol=0)


def test_weak_bins_beside_strong_ones_are_rounded_as_torchaudio_rounds_them() -> None:
    waveform = speech_like(160000, seed=3)
    expected = kaldi.fbank(waveform[None], num_mel_bins=80)
    assert (expected.double() - kaldi.fbank(waveform[None].double(), num_mel_bins=80)).abs().max() > 1e-4
    torch.testing.assert_close(raw(KaldiFbank(delta_order=0, cmvn="none"), waveform), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fill", [0.0, 0.7, float("nan"), float("inf")])
def test_padding_changes_no_valid_token_and_padded_tokens_are_zero(fill: float) -> None:
    lengths = [3217, 1500, 16000, 1200, 1999]
    waveforms = batch(lengths, torch.float64, fill)
    for features in every_front_end():
        tokens, token_lengths = features(waveforms, torch.tensor(lengths))
        for i, length in enumerate(lengths):
            alone, alone_lengths = features(waveforms[i : i + 1, :length])
            assert token_lengths[i] == alone_lengths[0] == alone.shape[1]
            torch.testing.assert_close(tokens[i, : alone.shape[1]], alone[0], atol=1e-10, rtol=0)
            assert (tokens[i, alone.shape[1] :] == 0).all()


def test_global_cmvn_is_padding_exact() -> None:
    features = KaldiFbank(cmvn="global", stack=2)
    lengths = [2000, 5000]
    waveforms = batch(lengths, torch.float64, fill=0.5)
    features.fit([(waveforms, torch.tensor(lengths))])
    tokens, token_lengths = features(waveforms, torch.tensor(lengths))
    alone, _ = features(waveforms[:1, :2000])
    torch.testing.assert_close(tokens[:1, : alone.shape[1]], alone, atol=1e-10, rtol=0)
    assert (tokens[0, token_lengths[0] :] == 0).all()


@pytest.mark.parametrize("stack", [1, 3])
def test_num_tokens_agrees_with_forward_and_num_samples_is_the_fewest(stack: int) -> None:
    for features in (
        LogMel(stack=stack, n_mels=4),
        LogMel(stack=stack, n_mels=4, center=True),
        KaldiFbank(stack=stack, num_mel_bins=4, sample_rate=8000),
    ):
        fewest = features.num_samples(1)
        for num_samples in [*range(fewest, fewest + 700, 23), fewest + 159, fewest + 160, fewest + 161]:
            tokens, lengths = features(torch.zeros(1, num_samples))
            assert tokens.shape[1] == lengths.item() == features.num_tokens(num_samples)
            assert features.num_samples(tokens.shape[1]) <= num_samples < features.num_samples(tokens.shape[1] + 1)
        counts = torch.arange(0, 3000, 7)
        assert features.num_tokens(counts).tolist() == [features.num_tokens(n) for n in counts.tolist()]
        assert features.num_tokens(fewest - 1) == features.num_tokens(0) == 0


def test_utterance_cmvn_gives_zero_mean_and_unit_unbiased_deviation_over_valid_frames() -> None:
    lengths = [16000, 8000, 4321]
    tokens, token_lengths = KaldiFbank()(batch(lengths, torch.float64), torch.tensor(lengths))
    for row, frames in zip(tokens.numpy(), token_lengths.tolist(), strict=True):
        np.testing.assert_allclose(row[:frames].mean(0), 0.0, atol=1e-10)
        np.testing.assert_allclose(row[:frames].std(0, ddof=1), 1.0, atol=1e-10)


def test_level_takes_one_mean_from_the_static_channels_alone() -> None:
    lengths = [16000, 8000, 4321]
    tokens, token_lengths = LogMel(cmvn="level", delta_order=1)(batch(lengths), torch.tensor(lengths))
    plain, _ = LogMel(cmvn="none", delta_order=1)(batch(lengths), torch.tensor(lengths))
    louder, _ = LogMel(cmvn="level", delta_order=1)(4 * batch(lengths), torch.tensor(lengths))
    for row, other, raised, frames in zip(tokens.numpy(), plain.numpy(), louder.numpy(), token_lengths.tolist(), strict=True):
        expected = other[:frames, :80] - other[:frames, :80].astype(np.float64).mean()
        np.testing.assert_allclose(row[:frames, :80], expected, atol=1e-4)
        np.testing.assert_array_equal(row[:frames, 80:], other[:frames, 80:])
        np.testing.assert_allclose(raised[:frames], row[:frames], atol=1e-3)  # a speaker's level is gone, the spectrum is not


def test_global_fit_equals_numpy_over_all_frames() -> None:
    features = LogMel(cmvn="global", delta_order=1)
    plain = LogMel(cmvn="none", delta_order=1)
    groups = [[4000, 2000], [1234, 8000, 560], [3000, 3000]]
    batches = [(batch(group, fill=0.9), torch.tensor(group)) for group in groups]
    features.fit([*batches[:2], (batches[2][0], None)])
    frames = []
    for waveforms, lengths in batches:
        tokens, token_lengths = plain(waveforms, lengths)
        frames += [tokens[i, :n].numpy().astype(np.float64) for i, n in enumerate(token_lengths.tolist())]
    everything = np.concatenate(frames)
    np.testing.assert_allclose(features.cmvn_mean.numpy(), everything.mean(0), atol=1e-5)
    np.testing.assert_allclose(features.cmvn_std.numpy(), everything.std(0, ddof=1), rtol=1e-5)
    actual, _ = features(batches[0][0][:1])
    expected = (frames[0] - everything.mean(0)) / everything.std(0, ddof=1)
    np.testing.assert_allclose(actual[0].numpy(), expected, atol=1e-4)


def test_state_dict_carries_the_global_statistics_and_nothing_else() -> None:
    fitted = LogMel(cmvn="global", n_mels=20)
    waveforms = batch([4000, 6000])
    fitted.fit([(waveforms, torch.tensor([4000, 6000]))])
    assert set(fitted.state_dict()) == {"cmvn_mean", "cmvn_std"}
    assert not KaldiFbank().state_dict()
    restored = LogMel(cmvn="global", n_mels=20)
    restored.load_state_dict(fitted.state_dict())
    torch.testing.assert_close(restored(waveforms)[0], fitted(waveforms)[0], atol=0, rtol=0)


def test_silence_and_a_single_frame_give_zeros() -> None:
    for features in (LogMel(), KaldiFbank(), MFCC(delta_order=2), Spectrogram()):
        silent, _ = features(torch.zeros(2, 16000), torch.tensor([16000, 9000]))
        assert silent.abs().max() < 0.05  # the rounding of a mean of -76, over the floor of the deviation
        for lengths in (None, torch.tensor([400])):
            single, _ = features(speech_like(400)[None], lengths)
            assert single.shape[1] == 1
            assert (single == 0).all()
    for features in (LogMel(cmvn="none"), KaldiFbank(cmvn="none"), MFCC(cmvn="none"), Spectrogram(cmvn="none")):
        assert raw(features, torch.zeros(4000)).isfinite().all()


def test_stacking_joins_consecutive_frames_and_unstack_undoes_it() -> None:
    waveform = speech_like(400 + 160 * 10)  # 11 frames: 3 tokens of 3, two frames dropped
    frames = raw(LogMel(cmvn="none"), waveform)
    features = LogMel(cmvn="none", stack=3)
    tokens, lengths = features(waveform[None])
    assert features.output_dim == 240
    assert features.num_channels == 80
    assert lengths.tolist() == [3]
    expected = torch.stack([torch.cat([frames[3 * t], frames[3 * t + 1], frames[3 * t + 2]]) for t in range(3)])
    torch.testing.assert_close(tokens[0], expected, atol=0, rtol=0)
    torch.testing.assert_close(features.unstack(tokens)[0], frames[:9], atol=0, rtol=0)
    with pytest.raises(ValueError, match="multiple of stack = 3"):
        features.unstack(torch.zeros(1, 2, 80))


def test_frame_centers_are_the_middles_of_what_a_frame_hears() -> None:
    features = Spectrogram(cmvn="none")
    for t, center in enumerate(features.frame_centers(4).tolist()):
        click = torch.zeros(1000)
        click[center] = 1.0  # the Hann window is 1 in its middle, where a click has a power of 1 in every bin
        torch.testing.assert_close(raw(features, click)[t], torch.zeros(201), atol=1e-5, rtol=0)
    centred = Spectrogram(cmvn="none", center=True)
    assert centred.frame_centers(4).tolist() == [0, 160, 320, 480]
    for t, center in enumerate(centred.frame_centers(6).tolist()):
        click = torch.zeros(960)
        click[center] = 1.0
        torch.testing.assert_close(raw(centred, click)[t], torch.zeros(201), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "features",
    [
        LogMel(n_mels=40, n_fft=1024, win_length=800, cmvn="none"),
        LogMel(n_mels=40, n_fft=1024, win_length=800, f_min=100.0, f_max=6000.0, mel_scale="slaney", cmvn="none"),
        KaldiFbank(num_mel_bins=40, frame_length_ms=50.0, high_freq=-1000.0, delta_order=0, cmvn="none"),
        Spectrogram(cmvn="none"),
    ],
)
def test_a_tone_is_loudest_in_the_channel_of_its_frequency(features: Features) -> None:
    scale = features.scale
    assert scale.hertz is not None
    assert len(scale.hertz) == features.num_channels
    for channel in (10, 25, 38):
        tone = torch.sin(2 * torch.pi * scale.hertz[channel] * torch.arange(4000) / 16000)
        assert raw(features, tone).argmax(-1).unique().tolist() == [channel]


def test_a_scale_has_the_times_of_frames_and_tokens_and_no_frequencies_of_cepstra_or_deltas() -> None:
    scale = LogMel(stack=3).scale  # the middles of its frames are 12.5 ms, 22.5 ms, …
    np.testing.assert_allclose(scale.edges(3), [0.0075, 0.0175, 0.0275])
    np.testing.assert_allclose(scale.token_edges(2), [0.0075, 0.0375, 0.0675])
    assert LogMel(center=True).scale.first_s == 0
    assert all(features.scale.hertz is None for features in (MFCC(), KaldiFbank(), LogMel(delta_order=1)))


def test_autocast_and_a_half_precision_model_leave_the_features_unchanged() -> None:
    waveforms = batch([4000, 3000])
    lengths = torch.tensor([4000, 3000])
    for features in every_front_end():
        expected, _ = features(waveforms, lengths)
        assert expected.dtype == torch.float32
        assert not expected.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(features(waveforms, lengths)[0], expected, atol=0, rtol=0)
        torch.nn.Sequential(features).to(torch.bfloat16)
        torch.testing.assert_close(features(waveforms, lengths)[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_is_not_waited_for_wherever_the_lengths_are(device: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    waveforms, lengths = batch([4000, 3000]), torch.tensor([4000, 3000])
    fitted = KaldiFbank(cmvn="global")
    fitted.fit([(waveforms, lengths)])
    for features in [*every_front_end(), fitted]:
        expected, _ = features(waveforms, lengths)
        features.cuda()
        arguments = waveforms.cuda(), lengths.to(device)
        features(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, token_lengths = features(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert tokens.device.type == "cuda"
        assert token_lengths.device.type == device
        torch.testing.assert_close(tokens.cpu(), expected, atol=1e-3, rtol=0)


def test_too_short_utterances_are_named() -> None:
    with pytest.raises(ValueError, match="item 1 of the batch has 300 samples: one token needs 400"):
        LogMel()(torch.zeros(3, 1000), torch.tensor([1000, 300, 900]))
    with pytest.raises(ValueError, match="item 1 of the batch has 200 samples: one token needs 201"):
        LogMel(center=True)(torch.zeros(2, 1000), torch.tensor([1000, 200]))  # half a window is reflected
    with pytest.raises(ValueError, match=r"too short, with 719 samples: one token needs 720.*0\.045 s"):
        LogMel(stack=3)(torch.zeros(3, 719))


def test_global_cmvn_before_fit_names_the_remedy() -> None:
    features = LogMel(cmvn="global")
    with pytest.raises(ValueError, match=r"call features\.fit"):
        features(torch.zeros(1, 1000))
    with pytest.raises(ValueError, match="at least two frames, found 1"):
        features.fit([(torch.zeros(1, 400), None)])
    with pytest.raises(ValueError, match=r"needs features\.cmvn=global, found utterance"):
        LogMel().fit([])


@pytest.mark.parametrize(
    ("waveforms", "lengths", "message"),
    [
        (torch.zeros(1000), None, r"must be \(batch, samples\)"),
        (torch.zeros(1, 1000, dtype=torch.int16), None, "divide 16-bit samples"),
        (torch.zeros(2, 1000), torch.tensor([1000]), r"must be \(2,\) integers"),
        (torch.zeros(2, 1000), torch.tensor([1.0, 0.5]), r"must be \(2,\) integers"),
        (torch.zeros(2, 1000), torch.tensor([900, 1001]), "item 1 of the batch has length 1001"),
    ],
)
def test_wrong_input_is_refused(waveforms: torch.Tensor, lengths: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel()(waveforms, lengths)


@pytest.mark.parametrize(
    ("front_end", "options", "message"),
    [
        (LogMel, {"cmvn": "speaker"}, "cmvn must be"),
        (LogMel, {"mel_scale": "bark"}, "mel_scale must be"),
        (LogMel, {"norm": "area"}, "norm must be"),
        (LogMel, {"n_fft": 256}, "n_fft must be at least win_length = 400"),
        (LogMel, {"f_max": 9000.0}, "within 0 to 8000 Hz"),
        (LogMel, {"stack": 0}, "stack must be at least 1"),
        (LogMel, {"eps": 0.0}, "eps must be positive"),
        (KaldiFbank, {"delta_order": 3}, "delta_order must be"),
        (KaldiFbank, {"delta_window": 4}, "delta_window must be odd"),
        (KaldiFbank, {"low_freq": 5000.0, "high_freq": 4000.0}, "must be a band"),
        (MFCC, {"n_mfcc": 24}, "n_mfcc must be between 1 and num_mel_bins = 23"),
    ],
)
def test_wrong_options_are_refused(front_end: type[Features], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        front_end(**options)


def test_empty_mel_filters_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"10 of 160 mel filters.*raise features\.n_fft"):
        LogMel(n_mels=160)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_hold_every_parameter_at_its_default(path: Path) -> None:
    config = dict(OmegaConf.load(path))
    known = parameters(get_class(config["_target_"]))
    assert {key: value for key, value in config.items() if key != "_target_"} == {
        name: parameter.default for name, parameter in known.items() if parameter.default is not inspect.Parameter.empty
    }
    features = instantiate(config)
    tokens, lengths = features(speech_like(8000)[None])
    assert tokens.shape == (1, lengths.item(), features.output_dim)


def test_every_front_end_has_a_config() -> None:
    targets = {dict(OmegaConf.load(path))["_target_"].rsplit(".", 1)[1] for path in CONFIGS}
    assert targets == {"LogMel", "KaldiFbank", "MFCC", "Spectrogram", "Waveform"}
