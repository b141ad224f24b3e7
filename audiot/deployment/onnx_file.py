"""Models as ONNX files, and how onnxruntime runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from audiot.deployment.graphs import Deployable, quiet

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 (torch.onnx needs it)
except ImportError as error:
    message = "ONNX files need onnx, onnxruntime and onnxscript: pip install 'audiot[onnx]'"
    raise ImportError(message, name=error.name) from error

SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules around it, and its own name
MOST_BYTES = 2**31 - 1  # of a file of protocol buffers


def write_onnx(path: Path, model: Deployable, program: ExportedProgram, opset: int = 18) -> None:
    """Write a graph as an ONNX file, with the model's description as its metadata.

    The inputs are ``waveforms``, float32 (batch, samples), and ``lengths``, int64 (batch,) in samples. The outputs are
    `Deployable.output` and ``num_frames``, int64 (batch,).

    Args:
        path: The file.
        model: What the graph is of.
        program: Its graph.
        opset: Version of ONNX's operators.

    Raises:
        ValueError: the graph has an operator that ONNX lacks, or the model is too large for a file.
    """
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > MOST_BYTES:
        raise ValueError(f"an ONNX file holds at most 2 GiB, and the weights take {size / 2**30:.1f}: use audiot export-torch")
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                input_names=["waveforms", "lengths"],
                output_names=[model.output, "num_frames"],
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # PyTorch has many kinds
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the model can't be written as ONNX: {reason[0][:300]}") from error
    assert exported is not None
    proto = exported.model_proto
    _name_axes(proto, model)
    _name_nodes(proto)
    onnx.helper.set_model_props(proto, model.metadata())
    onnx.save_model(proto, path)


def describe(path: Path, model: Deployable) -> None:
    """Write a model's description into its file again."""
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, model.metadata())
    onnx.save_model(proto, path)


def _name_axes(proto: onnx.ModelProto, model: Deployable) -> None:
    """Give dimensions of any size the names of what they count."""
    waveforms, _ = proto.graph.input
    names = dict(zip((dim.dim_param for dim in waveforms.type.tensor_type.shape.dim), ("batch", "samples"), strict=True))
    outputs, _ = proto.graph.output
    for dim, axis in zip(outputs.type.tensor_type.shape.dim, model.axes, strict=True):
        if dim.dim_param and dim.dim_param not in names:
            names[dim.dim_param] = axis
    del proto.graph.value_info[:]  # sizes inside, which whoever changes the graph would have to change too
    for value in [*proto.graph.input, *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _name_nodes(proto: onnx.ModelProto) -> None:
    """Name the nodes by the modules that they are of, and take out what else the exporter notes of them."""
    for node in proto.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get(SCOPES, "[]"))
        node.name = "/".join([*(scope for scope in scopes[-2:-1] if not scope.startswith("_")), node.name])
        del node.metadata_props[:]


class OnnxModel:
    """A model of an ONNX file, run by onnxruntime on the CPU: a `audiot.deployment.graphs.Compute`.

    Args:
        path: The file.

    Raises:
        ValueError: onnxruntime lacks an operator of the graph.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has many kinds
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"onnxruntime {onnxruntime.__version__} can't run the graph: {reason[:300]}") from error

    def __call__(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and numbers of frames."""
        inputs = {"waveforms": waveforms.numpy().astype(np.float32), "lengths": lengths.numpy().astype(np.int64)}
        outputs, counts = self.session.run(None, inputs)
        return torch.from_numpy(outputs), torch.from_numpy(counts)
