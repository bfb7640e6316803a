"""Time merged models where they run: python benchmarks/deployment.py [MODEL] [--engines onnx ...] [--batch-size 1 16].

Each engine runs the model itself, merging by learned embeddings, and tokens dropped unseen (see references.py),
exported in the same way, in turns. The ideal is the ratio of the FLOPs. The operations that merging adds to the ONNX
graph are counted.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import timm
import torch
from references import Dropping, in_turns, machine, median, ratio
from torch import Tensor, nn

import timm_tokens

Engine = Callable[[nn.Module, Tensor, Path, int], Callable[[], object]]


def export_onnx(model: nn.Module, images: Tensor, path: Path) -> Path:
    file = path / "model.onnx"
    if len(images) == 1:  # an example of one image would make 1 a constant; this is no other graph
        images = torch.cat([images, images])
    torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch", max=1024)},))  # fmt: skip
    return file


def session(file: Path, images: Tensor, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or sessions disturb each other
    run = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {run.get_inputs()[0].name: images.numpy()}
    return lambda: run.run(None, feed)[0]


def onnx(model: nn.Module, images: Tensor, path: Path, threads: int) -> Callable[[], object]:
    return session(export_onnx(model, images, path), images, threads)


def onnx_int8(model: nn.Module, images: Tensor, path: Path, threads: int) -> Callable[[], object]:
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file, ready, small = export_onnx(model, images, path), path / "ready.onnx", path / "int8.onnx"
    quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
    quantize_dynamic(ready, small, op_types_to_quantize=["MatMul", "Gemm"])
    return session(small, images, threads)


def openvino(model: nn.Module, images: Tensor, path: Path, threads: int) -> Callable[[], object]:
    import openvino

    graph = openvino.convert_model(export_onnx(model, images, path))
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(graph, "CPU", settings)
    return lambda: compiled(images.numpy())[0]


def aot_inductor(model: nn.Module, images: Tensor, path: Path, threads: int) -> Callable[[], object]:
    program = torch.export.export(model, (images,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    return lambda: run(images)


def torchao_int8(model: nn.Module, images: Tensor, path: Path, threads: int) -> Callable[[], object]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = deepcopy(model)
    quantize_(model.base if hasattr(model, "base") else model, Int8DynamicActivationInt8WeightConfig())
    run = torch.compile(model)
    return lambda: run(images)


ENGINES: dict[str, Engine] = {
    "onnx": onnx,
    "onnx_int8": onnx_int8,
    "openvino": openvino,
    "aot_inductor": aot_inductor,
    "torchao_int8": torchao_int8,
}


def operations(models: dict[str, nn.Module], images: Tensor) -> str:
    """How many more operations of each kind merging has than the model itself, as exported to ONNX."""
    import onnx

    counts = {}
    for name in ("base", "merged"):
        with tempfile.TemporaryDirectory() as path:
            graph = onnx.load(export_onnx(models[name], images, Path(path))).graph
        counts[name] = Counter(node.op_type for node in graph.node)
    added = counts["merged"] - counts["base"]
    return ", ".join(f"{kind} {count}" for kind, count in added.most_common())


@torch.no_grad()
def measure(engine: str, models: dict[str, nn.Module], batch: int, rounds: int, threads: int) -> tuple[float, ...]:
    """Milliseconds of the base, and the speed-ups of merging and of dropping."""
    images = torch.randn(batch, 3, 224, 224)
    with tempfile.TemporaryDirectory() as path:
        folders = [Path(path, name) for name in models]
        for folder in folders:
            folder.mkdir()
        calls = [ENGINES[engine](m, images, f, threads) for m, f in zip(models.values(), folders, strict=True)]
        if "int8" not in engine:
            ours = torch.as_tensor(np.asarray(calls[0]()))
            torch.testing.assert_close(ours, models["base"](images), atol=1e-3, rtol=1e-3)
        base, *others = in_turns(calls, rounds)
    torch.compiler.reset()
    return 1e3 * median(base), *(ratio(base, seconds) for seconds in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--r", type=int, default=12)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, help="default: as many as make 60 images, at least 9")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = timm.create_model(args.model).eval()
    merged = timm_tokens.apply_dtem_merging(base, args.r).eval()
    models = {"base": base, "merged": merged, "dropped": Dropping(base, merged.merger.schedule).eval()}
    ideal = merged.costs().flops((0,) * len(base.blocks), features=True) / merged.flops()
    print(f"{args.model}, r = {args.r}, ideal {ideal:.2f}; {machine()}\n")
    print(
        "| engine | batch | base, ms | merged | of ideal | dropped | merged of dropped |\n" + "|---" * 7 + "|",
        flush=True,
    )
    for engine in args.engines:
        for batch in args.batch_size:
            ms, ours, dropped = measure(engine, models, batch, args.rounds or max(9, 60 // batch), args.threads)
            values = (ours, ours / ideal, dropped, ours / dropped)
            print(f"| {engine} | {batch} | {ms:.1f} | {' | '.join(f'{v:.2f}' for v in values)} |", flush=True)
    print(f"\nONNX: merging adds {operations(models, torch.randn(2, 3, 224, 224))}")


if __name__ == "__main__":
    main()
