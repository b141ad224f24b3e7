"""Any audiot encoder as an upstream of S3PRL (github.com/s3prl/s3prl, 0.4.18), for its downstream suite.

S3PRL finds upstreams as attributes of ``s3prl.hub``. ``python -m audiot.s3prl_upstream ARGUMENTS`` is S3PRL's
``run_downstream.py ARGUMENTS`` with this one among them::

    python -m audiot.s3prl_upstream -m train -n NAME -u audiot_local -k RUN/encoder -d phone_linear -c …/config.yaml

In a program, `register` does it, and for ``torch.hub.load(FOLDER, "audiot_local", source="local", ckpt=…)`` a ``hubconf.py`` in
FOLDER that says ``from audiot.s3prl_upstream import audiot_local``. S3PRL itself is needed by `register` and the command alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiot.checkpoint import load_encoder

SAMPLE_RATE = 16000  # Hz, of all S3PRL


class UpstreamExpert(nn.Module):
    """An exported encoder, as S3PRL calls upstreams: each waveform gets the hidden states that it gets alone.

    Args:
        ckpt: The encoder's folder (``RUN/encoder``), S3PRL's ``-k``.
        trusted: Packages from outside audiot whose classes its config may name.

    Raises:
        FileNotFoundError: there is no encoder.
        ValueError: what is there is of another kind, or for audio that isn't sampled at 16 kHz.
    """

    def __init__(self, ckpt: str | Path, trusted: Sequence[str] = ()) -> None:
        super().__init__()
        self.encoder = load_encoder(ckpt, tuple(trusted))
        rate = self.encoder.features.sample_rate
        if rate != SAMPLE_RATE:
            raise ValueError(f"the encoder {ckpt} hears audio at {rate} Hz, S3PRL's is at {SAMPLE_RATE}: pre-train one at that")

    def get_downsample_rates(self, key: str = "hidden_states") -> int:
        """Samples from one hidden state to the next."""
        return self.encoder.features.hop_length * self.encoder.features.stack

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Hidden states of waveforms at 16 kHz.

        Args:
            wavs: Of any lengths (samples,); what is shorter than one state needs gets zeros behind.

        Returns:
            ``hidden_states``: one (B, T, d) a layer and the input embedding's before them, zero behind a waveform's end;
            ``last_hidden_state``: the last of them.
        """
        shortest = self.encoder.features.num_samples(1)
        lengths = torch.tensor([max(len(wav), shortest) for wav in wavs])
        waveforms = pad_sequence(list(wavs), batch_first=True)
        waveforms = nn.functional.pad(waveforms, (0, max(0, shortest - waveforms.shape[1])))
        hidden, _ = self.encoder(waveforms, lengths)
        states = hidden.unbind()
        return {"hidden_states": states, "last_hidden_state": states[-1]}


def audiot_local(ckpt: str | Path, model_config: str | None = None, refresh: bool = False, **options: Any) -> UpstreamExpert:
    """S3PRL's entry point.

    Args:
        ckpt: Folder of the encoder (``-k``).
        model_config: Must be None: an encoder brings its own config.
        refresh: Ignored: nothing is downloaded.
        options: For `UpstreamExpert`: what a downstream config has under ``upstream_expert``.
    """
    if model_config is not None:
        raise ValueError(f"audiot_local takes no config (-g {model_config}): the encoder in -k brings its own")
    return UpstreamExpert(ckpt, **options)


def register() -> None:
    """Make ``audiot_local`` known to S3PRL in this process: its runners, and ``S3PRLUpstream("audiot_local", RUN/encoder)``."""
    from s3prl import hub

    hub.audiot_local = audiot_local


if __name__ == "__main__":
    register()
    from s3prl.run_downstream import main

    main()
