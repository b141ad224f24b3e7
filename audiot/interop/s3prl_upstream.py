"""Any audiot encoder as an upstream of S3PRL (github.com/s3prl/s3prl, 0.4.18), for its downstream suite.

S3PRL finds upstreams as attributes of ``s3prl.hub``. ``python -m audiot.s3prl_upstream ARGUMENTS`` runs S3PRL's
``run_downstream.py ARGUMENTS`` with this upstream added::

    python -m audiot.s3prl_upstream -m train -n NAME -u audiot_local -k RUN/encoder -d phone_linear -c …/config.yaml

In a program, call `register`. For ``torch.hub.load(FOLDER, "audiot_local", source="local", ckpt=…)``, write a ``hubconf.py`` in
FOLDER with ``from audiot.s3prl_upstream import audiot_local``. Only `register` and the command need S3PRL itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from audiot.checkpoint import load_encoder

SAMPLE_RATE = 16000  # Hz, the only sample rate in S3PRL


class UpstreamExpert(nn.Module):
    """An exported encoder with S3PRL's interface of upstreams. The hidden states of a waveform do not depend on the batch.

    Args:
        ckpt: Folder of the encoder (``RUN/encoder``), S3PRL's ``-k``.
        trusted: Packages from outside audiot whose classes its config may name.

    Raises:
        FileNotFoundError: there is no encoder.
        ValueError: the folder holds something else, or the encoder needs another sample rate than 16 kHz.
    """

    def __init__(self, ckpt: str | Path, trusted: Sequence[str] = ()) -> None:
        super().__init__()
        self.encoder = load_encoder(ckpt, trusted)
        rate = self.encoder.features.sample_rate
        if rate != SAMPLE_RATE:
            raise ValueError(
                f"the encoder {ckpt} takes audio at {rate} Hz, but S3PRL's is at {SAMPLE_RATE} Hz: pre-train one at this rate"
            )

    def get_downsample_rates(self, key: str = "hidden_states") -> int:
        """Samples from one hidden state to the next."""
        return self.encoder.features.hop_length * self.encoder.features.stack

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Hidden states of waveforms at 16 kHz.

        Args:
            wavs: Waveforms (samples,) of any lengths. Those too short for one state are padded with zeros.

        Returns:
            ``hidden_states``: the input embedding and the output of each layer, (B, T, d) each and zero on padding;
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
        model_config: Must be None, because an encoder has its own config.
        refresh: Ignored, because nothing is downloaded.
        options: Arguments of `UpstreamExpert`, from ``upstream_expert`` in a downstream config.
    """
    if model_config is not None:
        raise ValueError(f"audiot_local takes no config (-g {model_config}): the encoder in -k has its own")
    return UpstreamExpert(ckpt, **options)


def register() -> None:
    """Add ``audiot_local`` to S3PRL in this process, for its runners and ``S3PRLUpstream("audiot_local", RUN/encoder)``."""
    from s3prl import hub

    hub.audiot_local = audiot_local


if __name__ == "__main__":
    register()
    from s3prl.run_downstream import main

    main()
