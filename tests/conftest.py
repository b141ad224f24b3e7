"""What many tests share: a tiny prepared corpus, and plain configs of a tiny model."""

from __future__ import annotations

import copy

import pytest

TINY = {
    "features": {"_target_": "audiot.features.LogMel", "n_mels": 20, "stack": 3},
    "model": {
        "_target_": "audiot.model.Encoder",
        "embed_dim": 24,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 48,
        "max_frames": 140,
        "attention": {"_target_": "audiot.attention.query_key.QueryKey"},
        "positions": {"_target_": "audiot.positions.Rotary"},
        "dropout": 0.1,
    },
    "objective": {"_target_": "audiot.masking.Corruption", "span": 3},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 2e-3, "weight_decay": 0.01},
    "scheduler": {"_target_": "audiot.optimization.linear_warmup_decay", "_partial_": True},
}


@pytest.fixture
def tiny():
    """Configs as plain dicts: features, model, objective, optimizer, scheduler."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory):
    """A prepared demo corpus: two training speakers, some 40 s of speech."""
    pytest.importorskip("espeakng_loader")
    from audiot.data.corpora.demo import DemoCorpus
    from audiot.data.prepare import prepare

    folder = tmp_path_factory.mktemp("demo")
    demo = DemoCorpus(
        folder / "demo",
        hours=0.01,
        num_speakers=2,
        num_valid_speakers=1,
        num_test_speakers=1,
        heldout_utterances=6,
        speaker_utterances=2,
        num_jobs=1,
    )
    return prepare(lambda: demo.manifests(progress=False), folder / "prepared", num_jobs=1, progress=False)
