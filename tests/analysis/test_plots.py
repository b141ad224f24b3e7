"""Every plot is written, whole, as a picture of about the right size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from audiot.analysis.plots import (
    plot_attention,
    plot_codes,
    plot_confusion,
    plot_layer_weights,
    plot_measures,
    plot_probes,
    plot_reconstruction,
    plot_scores,
    plot_training,
)
from audiot.base.framing import SpectrogramScale
from audiot.objectives.reconstruction import Reconstruction

SUMMARY = {
    "pretrain/val_l1": 0.5,
    "steps": 100,
    "probe/phone/encoder": 0.5,
    "probe/phone/random": 0.4,
    "probe/phone/features": 0.45,
    "finetune/phone/encoder": 0.6,
    "finetune/phone/random": 0.55,
}


SCALE = SpectrogramScale(0.02, 0.01)  # frame t is from 15 + 10 t ms
HERTZ = tuple(100.0 * 1.2**channel for channel in range(20))


def picture(path):
    """Pixels of a PNG, which must hold more than a plain background."""
    pixels = imread(path)
    assert pixels.dtype == np.float32
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2])[:, :3], axis=0)) > 50
    assert [other.name for other in path.parent.iterdir()] == [path.name]  # no temporary file is left
    return pixels


def view(seed=0, length=40, num_frames=60):
    generator = torch.Generator().manual_seed(seed)
    target, prediction, interpolation = (torch.randn(1, num_frames, 20, generator=generator) for _ in range(3))
    masked = torch.zeros(1, num_frames, dtype=torch.bool)
    masked[0, 5:12] = masked[0, 30:37] = True
    return {
        "target": target,
        "corrupted": target.masked_fill(masked[..., None], 0),
        "prediction": prediction,
        "interpolation": interpolation,
        "masked": masked,
        "lengths": torch.tensor([length]),
    }


def test_reconstruction_shows_four_pictures_of_the_valid_frames(tmp_path, drawn):
    plot_reconstruction(
        view(), SCALE._replace(hertz=HERTZ, kind="mel"), "utt7, step 3", tmp_path / "plots" / "reconstruction.png"
    )
    assert picture(tmp_path / "plots" / "reconstruction.png").shape[:2] == (880, 1100)
    shown = [axis.collections[0].get_array() for axis in drawn[0].axes]
    assert [image.shape for image in shown] == [(20, 40)] * 4
    given = view()
    masked = given["masked"][0, :40]
    for image, name in zip(shown, ["target", "corrupted", "prediction", "interpolation"], strict=True):
        values = torch.from_numpy(np.asarray(image)).T
        assert values[masked].equal(given[name][0, :40][masked])
        assert values[~masked].equal(given["target"][0, :40][~masked])
    error = (given["prediction"] - given["target"])[0, :40][masked].abs().mean()
    assert f"L1 {error:.3f}" in drawn[0].axes[2].get_title(loc="left")
    assert drawn[0].get_suptitle() == "utt7, step 3"
    for axis in drawn[0].axes:
        edges = [line.get_xdata()[0] for line in axis.lines]
        assert edges == pytest.approx([0.065, 0.135, 0.315, 0.385])  # frames 5 to 12 and 30 to 37
        assert axis.get_xlim() == pytest.approx((0.015, 0.415))
        assert (axis.get_ylabel(), axis.get_yscale()) == ("Hz", "symlog")
        low, high = axis.get_ylim()
        assert low < HERTZ[0] < HERTZ[-1] < high


def test_an_utterance_without_masked_frames_is_drawn_too(tmp_path):
    plot_reconstruction(view() | {"masked": torch.zeros(1, 60, dtype=torch.bool)}, SCALE, "", tmp_path / "picture.png")
    picture(tmp_path / "picture.png")


def test_codes_stand_below_their_frames(tmp_path, drawn):
    codes = torch.arange(30)[None, :, None]
    predicted = codes.clone()
    predicted[0, 6] = 0
    masked = torch.zeros(1, 60, dtype=torch.bool)
    masked[0, 10:16] = True  # tokens 5, 6, 7
    shown = view() | {"codes": codes, "predicted": predicted, "masked": masked}
    plot_codes(shown, SCALE._replace(stack=2), "title", tmp_path / "codes.png")
    picture(tmp_path / "codes.png")
    spectrogram, true, guess = drawn[0].axes
    assert spectrogram.get_ylabel() == "channel"
    assert [line.get_xdata()[0] for line in spectrogram.lines] == pytest.approx([0.115, 0.175])
    assert true.images[0].get_extent()[:2] == pytest.approx((0.015, 0.415))
    assert guess.lines[0].get_xdata().tolist() == pytest.approx([0.125, 0.165])  # middles of tokens 5 and 7
    assert "67% of 3 masked tokens right" in guess.get_title(loc="left")


def test_training_curves_are_those_of_the_file(tmp_path, drawn):
    rows = [
        "step,pretrain/train_l1,pretrain/val_l1,pretrain/zero_l1,pretrain/interpolation_l1,frames_per_s,pretrain/gradient_norm"
    ]
    rows += [f"{step},{0.8 - step / 1000},,,,{1000 + step},{1 + step / 100}" for step in range(9, 100, 10)]
    rows += ["49,,0.7,0.78,0.65,,", "99,,0.6,0.78,0.65,,"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(rows) + "\n")
    plot_training(tmp_path / "run" / "metrics.csv", tmp_path / "plots" / "training.png", Reconstruction)
    height, width = picture(tmp_path / "plots" / "training.png").shape[:2]
    assert (height, width) == (462, 1210)
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert lines["training batch"].get_xdata().tolist() == list(range(9, 100, 10))
    assert lines["validation"].get_ydata().tolist() == [0.7, 0.6]
    assert {"interpolation: 0.650", "zeros: 0.780"} <= lines.keys()


def test_training_curves_of_a_run_without_validation_are_drawn(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,pretrain/train_l1\n0,0.8\n9,0.7\n")
    (tmp_path / "plots").mkdir()
    plot_training(tmp_path / "metrics.csv", tmp_path / "plots" / "training.png", Reconstruction)
    picture(tmp_path / "plots" / "training.png")


def test_probes_have_a_bar_of_every_figure(tmp_path, drawn):
    plot_probes(SUMMARY, tmp_path / "probes.png")
    height, width = picture(tmp_path / "probes.png").shape[:2]
    assert height == 440
    assert width == pytest.approx(110 * (2 + 2 * 2.4), abs=2)
    axis = drawn[0].axes[0]
    heights = sorted(bar.get_height() for bar in axis.patches if bar.get_height())
    assert heights == pytest.approx([40, 45, 50, 55, 60])
    assert len(axis.get_xticks()) == 2


def test_probes_have_the_intervals_that_are_there(tmp_path, drawn):
    intervals = {"probe/phone/encoder": [0.58, 0.66], "finetune/phone/random": [0.1, 0.2]}  # the latter does not hold its figure
    plot_probes(SUMMARY | {"intervals": intervals}, tmp_path / "probes.png")
    picture(tmp_path / "probes.png")
    axis = drawn[0].axes[0]
    lines = [collection.get_segments()[0] for collection in axis.collections]
    places = {bar.get_height(): bar.get_x() + bar.get_width() / 2 for bar in axis.patches if bar.get_height()}
    expected = []
    for name, ends in intervals.items():
        expected += [[places[100 * SUMMARY[name]], 100 * end] for end in ends]
    np.testing.assert_allclose(np.concatenate(lines), expected)
    assert axis.get_title().endswith(", 95% intervals")
    assert sorted(float(text.get_text()) for text in axis.texts) == [40, 45, 50, 55, 60]


def maps(*names, heads=3):
    return {
        name: (2 * torch.rand(heads, 12, 12, generator=torch.Generator().manual_seed(number))).softmax(-1)
        for number, name in enumerate(names)
    }


def test_attention_has_a_map_of_every_head_below_the_spectrogram(tmp_path, drawn):
    weights = maps("layer 1", "layer 2")
    frames = torch.randn(24, 20, generator=torch.Generator().manual_seed(9))
    plot_attention(weights, SCALE._replace(stack=2), "Attention", tmp_path / "attention.png", frames)
    height, width = picture(tmp_path / "attention.png").shape[:2]
    assert height == pytest.approx(110 * (1.8 * 2.55 + 0.8), abs=2)
    assert width == pytest.approx(110 * (1.7 * 3 + 0.9), abs=2)
    axes = np.reshape(drawn[0].axes, (3, 3))
    for axis in axes[0]:
        np.testing.assert_array_equal(axis.collections[0].get_array(), frames.T)
    assert all(axis.get_xlim() == pytest.approx((0.015, 0.255)) for axis in axes.flat)  # 24 frames
    shown = axes[2, 1].images[0]
    np.testing.assert_allclose(shown.get_array() ** 2, weights["layer 2"][1], rtol=1e-5)
    assert shown.get_extent() == pytest.approx([0.015, 0.255, 0.255, 0.015])  # time runs down
    highest = weights["layer 2"][1].max()
    assert shown.get_clim()[1] ** 2 == pytest.approx(highest)  # its own scale
    assert axes[2, 1].texts[0].get_text() == f"0 to {highest:.2g}"


def test_maps_of_a_group_have_one_scale(tmp_path, drawn):
    weights = maps("trained", "untrained", "other", "other untrained", heads=2)
    weights["untrained"] = weights["untrained"] / 8
    plot_attention(weights, SCALE, "Attention", tmp_path / "attention.png", groups=2)
    axes = np.reshape(drawn[0].axes, (4, 2))
    highest = [[axis.images[0].get_clim()[1] ** 2 for axis in row] for row in axes]
    for head in range(2):
        first = [float(weights["trained"][head].max())] * 2
        second = [max(float(weights[name][head].max()) for name in ("other", "other untrained"))] * 2
        assert [row[head] for row in highest] == pytest.approx(first + second)


def test_attention_takes_names_and_masks(tmp_path, drawn):
    chosen = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    plot_attention(
        dict.fromkeys(("before", "one", "two"), chosen), SCALE, "Keys", tmp_path / "keys.png", columns=["left", "right"]
    )
    axes = np.reshape(drawn[0].axes, (3, 2))
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["before", "one", "two"]
    assert [axis.get_title() for axis in axes[0]] == ["left", "right"]
    np.testing.assert_array_equal(axes[2, 1].images[0].get_array(), chosen[1])


def test_confusion_shows_shares_of_the_true_class(tmp_path, drawn):
    counts = torch.tensor([[3, 1, 0], [0, 5, 5], [0, 0, 0]])
    plot_confusion(counts, ["A", "B", "C"], "phone", tmp_path / "confusion.png")
    height, width = picture(tmp_path / "confusion.png").shape[:2]
    assert height == pytest.approx(110 * 4.6, abs=2)
    assert width == height
    shares = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 0]])


def test_confusion_is_ordered_by_groups(tmp_path, drawn):
    counts = torch.tensor([[4, 0, 0], [1, 3, 0], [0, 2, 2]])
    plot_confusion(counts, ["B", "IY", "S"], "phone", tmp_path / "c.png", {"vowels": ["IY"], "others": ["S", "B"]})
    axis = drawn[0].axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0, 0.25], [0.5, 0.5, 0], [0, 0, 1]])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["IY", "S", "B"]
    assert axis.lines[0].get_ydata()[0] == 0.5  # between IY and S
    assert [text.get_text() for text in axis.texts] == ["vowels", "others"]


def test_scores_of_each_kind_are_a_density(tmp_path, drawn):
    rng = np.random.default_rng(0)
    kinds = {
        "same speaker": rng.normal(0.5, 0.1, 300).tolist(),
        "different speakers": rng.normal(0.0, 0.1, 2000).tolist(),
    }
    plot_scores(kinds, "verification", tmp_path / "scores.png")
    assert picture(tmp_path / "scores.png").shape[:2] == (440, 770)
    axis = drawn[0].axes[0]
    assert axis.get_title() == "verification"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["same speaker (300)", "different speakers (2,000)"]
    for bars, scores in zip(axis.containers, kinds.values(), strict=True):
        assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)
        highest = max(bars, key=lambda bar: bar.get_height())
        middle = highest.get_x() + highest.get_width() / 2
        assert middle == pytest.approx(np.median(scores), abs=0.1)


def test_layer_weights_are_a_bar_of_each_state(tmp_path, drawn):
    plot_layer_weights([0.2, 0.5, 0.3], ["0", "6", "12"], "phone", tmp_path / "layer_weights.png")
    picture(tmp_path / "layer_weights.png")
    axis = drawn[0].axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0.2, 0.5, 0.3]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "6", "12"]
    assert axis.lines[0].get_ydata()[0] == pytest.approx(1 / 3)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["equal shares"]


def test_a_failed_plot_leaves_the_old_picture(tmp_path, monkeypatch):
    plot_probes(SUMMARY, tmp_path / "probes.png")
    before = (tmp_path / "probes.png").read_bytes()

    def fail(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        plot_probes(SUMMARY, tmp_path / "probes.png")
    assert (tmp_path / "probes.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_measures_are_curves_over_layers_and_features_dashed_lines(tmp_path, drawn):
    def figures(error, pnmi):
        return {"within": {"error": error, "low": error / 2, "high": 2 * error}, "pnmi": pnmi}

    layers = [{"layer": layer, **figures(0.1 + 0.02 * layer, 0.3 * layer)} for layer in (0, 2)]
    plot_measures(layers, figures(0.2, 0.1), "x", tmp_path / "abx.png")
    picture(tmp_path / "abx.png")
    curves = [[line.get_xydata().tolist() for line in axis.lines] for axis in drawn[0].axes]
    assert curves[0][0] == [[0, pytest.approx(10)], [2, pytest.approx(14)]]
    assert curves[1][0] == [[0, 0], [2, 0.6]]
    dashed = [axis.lines[1] for axis in drawn[0].axes]
    assert [line.get_ydata()[0] for line in dashed] == [pytest.approx(20), 0.1]
    assert {line.get_linestyle() for line in dashed} == {"--"}
    plot_measures([{"layer": 0, "across": figures(0.1, 0)["within"]}], None, "x", tmp_path / "abx.png")
    assert len(drawn[1].axes) == 1
