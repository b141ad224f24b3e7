"""Front ends: waveform → features, inside the model. The Hydra group `conf/features` lists them."""

from audiot.features.base import Features
from audiot.features.kaldi import KaldiFbank
from audiot.features.log_mel import LogMel
from audiot.features.mfcc import MFCC
from audiot.features.spectrogram import Spectrogram
from audiot.features.waveform import Waveform

__all__ = ["MFCC", "Features", "KaldiFbank", "LogMel", "Spectrogram", "Waveform"]
