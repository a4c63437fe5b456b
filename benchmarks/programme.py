"""What the paper's whole programme costs, from what one unit of each stage costs; the tables of docs/performance.md.

python benchmarks/programme.py [--check] [--count]

--count first renders one scene for its bytes and counts the operations of a training step of vggt-1b, which needs
neither its weights nor a GPU, and writes both to results/programme/units.json. Seconds are those of the committed rows
of rendering.py and `subspace3d bench mining`. --check changes nothing and fails where the page is out of date.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import roofline
from table import markdown
from training_memory import build

from subspace3d.adapters.counts import count_trainable
from subspace3d.adapters.placement import select_modules
from subspace3d.backbones.find import find_backbone
from subspace3d.bench import harness
from subspace3d.bench.harness import read_rows
from subspace3d.files import read_json, write_json
from subspace3d.training.gradients import BATCHES, count_passes

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs/performance.md"
UNITS = FOLDER / "results/programme/units.json"
RENDERING = FOLDER / "results/rendering/intel-r-xeon-r-processor-2-cores.jsonl"
MINING = FOLDER / "results/intel-r-xeon-r-processor-2-cores.jsonl"
DENOISING = FOLDER / "results/denoising/amd-epyc-2-cores.jsonl"
TOGETHER = FOLDER / "results/together/amd-epyc-2-cores.jsonl"

RESOLUTION, SPP = 518, 64
SHARE = 0.4
"""Assumed: share of roofline.FLOPS that a training step sustains."""
LAUNCH = 6e-6
"""Assumed: seconds from one kernel to the next where PyTorch starts them one by one and none is long."""
CHUNK = 8
"""Images that the depth head takes at a time."""
SMALL, SMALL_FRAMES = 112, 2
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Programme:
    """Four attributes of ten data sets each, one adapter per data set; settings of docs/reproducing.md."""

    attributes: int = 4
    datasets: int = 40
    scenes: int = 200  # per data set
    views: int = 100
    rank: int = 16
    k: int = 16  # per attribute
    steps: int = 24_000  # of each adapter and of the fine-tuning: the release's 60 epochs of 400 batches
    frames: tuple[int, int] = (3, 16)
    images_per_step: int = 48

    @property
    def images(self) -> int:
        return self.datasets * self.scenes * self.views

    @property
    def images_a_step(self) -> float:
        """Mean over the number of frames, which is drawn uniformly: scenes are whole."""
        counts = range(self.frames[0], self.frames[1] + 1)
        return sum(self.images_per_step // count * count for count in counts) / len(counts)


# ---- units -----------------------------------------------------------------------------------------------------------


def count_units() -> dict[str, Any]:
    return {
        "scene_bytes_per_image": scene_bytes(4),
        "training_flops_per_image": training_flops(Programme().frames),
        "small_training_flops_per_image": training_flops((SMALL_FRAMES,), SMALL)[str(SMALL_FRAMES)],
        "training_kernels": training_kernels((CHUNK, 2 * CHUNK)),
        **harness.provenance(torch.device("cpu")),
    }


def scene_bytes(views: int) -> int:
    """Bytes on disk of one rendered image with its depth map and its share of scene.json."""
    from subspace3d.commands.generate import GenerateConfig
    from subspace3d.mitsuba_variant import choose_variant
    from subspace3d.scenes.scene import SceneJob, render_scene

    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(out=Path(folder), attribute="all", views=views, resolution=RESOLUTION, spp=SPP)
        render_scene(SceneJob(Path(folder) / "scene", 0, 0, config, choose_variant(), 1))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) // views


def training_flops(frames: tuple[int, ...], resolution: int = RESOLUTION) -> dict[str, float]:
    """Operations of forward and backward pass of vggt-1b with LoRA r = 16, an image, by frames in a scene.

    Counted on tensors without storage, activations recomputed as in training, attention as its two products.
    """
    found = {}
    for count, step in _steps_without_storage(frames, resolution):
        with FlopCounterMode(display=False) as counter:
            step()
        found[str(count)] = counter.get_total_flops() / count
    return found


def training_kernels(frames: tuple[int, ...]) -> dict[str, int]:
    """Operators of the same passes that compute something, by frames in the one scene; more or less the kernels."""
    found = {}
    for count, step in _steps_without_storage(frames, SMALL):
        with _Kernels() as counter:
            step()
        found[str(count)] = counter.count
    return found


def _steps_without_storage(frames: tuple[int, ...], resolution: int) -> Iterator[tuple[int, Callable[[], None]]]:
    model = build("vggt-1b", "lora", 16, checkpointing=True)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for count in frames:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, sdpa_kernel(SDPBackend.MATH):
            stand_ins = {f"model.{name}": fake.from_tensor(tensor) for name, tensor in state.items()}
            images = torch.zeros(1, count, 3, resolution, resolution)
            yield (
                count,
                lambda stand_ins=stand_ins, images=images: torch.func.functional_call(
                    _Step(model), stand_ins, (images,)
                ),
            )


class _Kernels(TorchDispatchMode):
    """Counts operators that are no views, allocations or questions about a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += not func.is_view and name.startswith("aten.") and "empty" not in name and "view" not in name
        return func(*args, **(kwargs or {}))


class _Step(nn.Module):
    """Forward and backward in one call, because recomputed blocks look up the parameters again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> None:
        predictions = self.model(images)
        outputs = [*predictions["pose_enc_list"], predictions["depth"], predictions["depth_conf"]]
        torch.stack([output.mean() for output in outputs]).sum().backward()


# ---- sums ------------------------------------------------------------------------------------------------------------


def newest(rows: list[dict], **wanted: Any) -> dict:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())][-1]


def power(rows: Sequence[tuple[float, float]]) -> float:
    """Exponent e of y = c x^e by least squares in the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in rows]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def flops_an_image(units: dict[str, Any], frames: float) -> float:
    """Linear in the frames between the two counts, because the tokens that one token attends to are."""
    (low, at_low), (high, at_high) = ((int(count), value) for count, value in units["training_flops_per_image"].items())
    return at_low + (at_high - at_low) * (frames - low) / (high - low)


def measured_table(programme: Programme, units: dict[str, Any], speeds: dict[int, float], mining: list[dict]) -> str:
    hours = programme.images / speeds[RESOLUTION] / 3600
    scene_bytes = units["scene_bytes_per_image"]
    mine_seconds = sum(row["seconds"] * row["threads"] for row in mining)
    matrices = sum(row["layers"] for row in mining)
    trained = count_trainable("vggt-1b", "lora", programme.rank)["total"]
    adapter_bytes = trained * FLOAT_BYTES
    subspace_bytes = sum(row["layers"] * (row["in"] + row["out"]) for row in mining) * programme.k * FLOAT_BYTES
    count = programme.attributes
    return markdown(
        ["stage", "unit", "per unit", "units", "sum"],
        [
            ["render", f"image of {RESOLUTION} px, {SPP} samples", f"{1 / speeds[RESOLUTION]:.2f} core seconds",
             f"{programme.images:,}", f"**{hours:,.0f} core hours**"],
            ["scenes on disk", "image with its depth map", f"{scene_bytes / 1e3:.0f} kB",
             f"{programme.images:,}", f"**{programme.images * scene_bytes / 1e12:.2f} TB**"],
            ["mine", f"attribute: {matrices} matrices, N = 10, r = {programme.rank}, 20 iterations",
             f"{mine_seconds:.1f} core seconds", f"{count}", f"**{count * mine_seconds:.0f} core seconds**"],
            ["adapters on disk", f"LoRA r = {programme.rank}: {trained:,} parameters", f"{adapter_bytes / 1e6:.1f} MB",
             f"{programme.datasets}", f"**{programme.datasets * adapter_bytes / 1e9:.2f} GB**"],
            ["subspaces on disk", f"k = {programme.k}, aggregator", f"{subspace_bytes / 1e6:.1f} MB",
             f"{count}", f"**{count * subspace_bytes / 1e9:.2f} GB**"],
        ],
    )  # fmt: skip


def denoising_sentence(row: dict[str, Any]) -> str:
    few, denoised, many = row["error"]
    error, share = row["error"], row["core_seconds"][denoised] / row["core_seconds"][many]
    views = f"{row['scenes']} scenes of {row['views']} views at {row['resolution']} px"
    return (
        f"Rendered with {few} samples and `--denoise`, an image is {error[denoised]:.1f} 8-bit steps (root mean "
        f"square) from one of {row['reference_spp']} samples; with {many} samples and no denoiser it is "
        f"{error[many]:.1f}, with {few} {error[few]:.1f}. Path tracing and denoising take {share:.2f} of the time of "
        f"{many} samples (`python benchmarks/denoising.py`, {views}, {row['device']}, commit {row['commit']})."
    )


def gradient_route(programme: Programme, units: dict[str, Any]) -> list[str]:
    """An adapter that is the gradient of a few steps' batches, beside one that is tuned."""
    weights = target_weights("vggt-1b")
    passes = count_passes(weights, 1)
    # tuning leaves out the product that gives a weight's gradient; few of the heads' are as large
    linears = sum(weight.numel() for name, weight in weights.items() if name.startswith("aggregator"))
    more = 2 * linears * roofline.TOKENS_PER_VIEW * programme.images_a_step
    operations = BATCHES * (passes * step_operations(programme, units) + more)
    seconds = operations / (SHARE * roofline.FLOPS)
    length = f"{BATCHES} batches of {programme.images_a_step:.1f} images, {passes} pass{'es' * (passes > 1)}"
    return ["adapt --gradient-only", f"adapter: {length}", f"{operations:.2g}", f"{seconds:,.0f} GPU seconds",
            f"{programme.datasets}", f"**{programme.datasets * seconds / 60:,.0f} GPU minutes**"]  # fmt: skip


def split_kernels(units: dict[str, Any]) -> tuple[int, int]:
    """Kernels of the depth head for one chunk of images, and all others of a step."""
    one, two = (units["training_kernels"][str(count)] for count in (CHUNK, 2 * CHUNK))
    return two - one, 2 * one - two


def step_seconds(units: dict[str, Any], adapters: int, images: float, operations: float) -> float:
    """Modelled seconds of a step of ``adapters`` adapters, each of so many images of so many operations."""
    head, rest = split_kernels(units)
    kernels = rest + adapters * math.ceil(images / CHUNK) * head
    return max(kernels * LAUNCH, adapters * images * operations / (SHARE * roofline.FLOPS))


def together_model(programme: Programme, units: dict[str, Any]) -> str:
    small = units["small_training_flops_per_image"]
    large = step_operations(programme, units) / programme.images_a_step
    rows = []
    for size, images, operations in (
        (SMALL, 4, small),
        (SMALL, 16, small),
        (RESOLUTION, programme.images_a_step, large),
    ):
        alone, four = (step_seconds(units, adapters, images, operations) for adapters in (1, 4))
        times = (f"{1e3 * alone:,.0f} ms", f"{1e3 * four / 4:,.0f} ms", f"{4 * alone / four:.1f}")
        rows.append([f"{images:.0f} of {size} px", *times])
    return markdown(["images a step of each", "an adapter alone", "one of four together", "ratio"], rows)


def together_measured(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in {(row["images_per_step"], row["image_size"]): row for row in rows}.values():
        core, wall = row["images_per_core_second"], row["images_per_second"]
        ways = ("one after another", "two at a time", "together")
        speeds = [core[ways[0]], core[ways[2]], *(wall[way] for way in ways)]
        table.append([f"{row['images_per_step']} of {row['image_size']} px", *(f"{speed:.2f}" for speed in speeds)])
    header = ["images a step of each", "a core second: one after another", "together"]
    return markdown([*header, "a second on two cores: one after another", "two at a time", "together"], table)


def together_text(programme: Programme, units: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    row, (head, rest) = rows[-1], split_kernels(units)
    return [
        f"`adapt --together`: images of {row['adapters']} adapters of {row['backbone']} (LoRA r = {row['r']}) on one "
        f"forward pass, measured on a CPU (`python benchmarks/together.py`, {row['device']}, both busy with other "
        f"work, commit {row['commit']}, fastest of {row['rounds']} rounds):",
        together_measured(rows),
        "An image costs less in a joint pass, the more so the smaller it is; but two processes of one thread each "
        "use two busy cores better than one of two threads, so there `--workers 2` comes first, `--together` on top.",
        f"On a GPU, modelled and not measured: a step of vggt-1b starts {rest + head:,} kernels (counted operators), "
        f"{head:,} of them in the depth head, which runs for every adapter and every {CHUNK} images. One is taken to "
        f"follow the other after {1e6 * LAUNCH:.0f} us at the earliest, arithmetic is as fast as above, and a step "
        "takes the larger of both:",
        together_model(programme, units),
        "It pays where images are small and steps short, and in memory, as the weights are there once.",
    ]


def step_operations(programme: Programme, units: dict[str, Any]) -> float:
    """Mean over the number of frames."""
    frames = range(programme.frames[0], programme.frames[1] + 1)
    images = [programme.images_per_step // count * count for count in frames]
    return sum(of * flops_an_image(units, count) for of, count in zip(images, frames)) / len(frames)


def target_weights(backbone: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = find_backbone(backbone).network()
    return {name: model.get_submodule(name).get_parameter("weight") for name in select_modules(model, "all")}


def modelled_table(programme: Programme, units: dict[str, Any]) -> str:
    operations = programme.steps * step_operations(programme, units)
    hours = operations / (SHARE * roofline.FLOPS) / 3600
    length = f"{programme.steps:,} steps of {programme.images_a_step:.1f} images"
    return markdown(
        ["stage", "unit", "operations, counted", "modelled per unit", "units", "sum"],
        [
            ["adapt", f"adapter: {length}", f"{operations:.2g}", f"{hours:,.0f} GPU hours", f"{programme.datasets}",
             f"**{programme.datasets * hours:,.0f} GPU hours**"],
            gradient_route(programme, units),
            ["fine-tune", "run of the same length", f"{operations:.2g}", f"{hours:,.0f} GPU hours", "1",
             f"**{hours:,.0f} GPU hours**"],
        ],
    )  # fmt: skip


def growth_table(programme: Programme, units: dict[str, Any], speeds: dict[int, float], rows: list[dict]) -> str:
    sweep = [row for row in rows if row["benchmark"] == "mining-sweep" and row["clock"] == "process"]
    by_layers = power([(row["layers"], row["seconds"]) for row in sweep if row["varies"] == "layers"])
    sizes = [(row["N"] * row["r"], row["seconds"]) for row in sweep if row["varies"] == "N r"]
    by_pixels = power([(size**2, 1 / speed) for size, speed in speeds.items()])
    low, high = (f"{flops_an_image(units, count) / 1e12:.1f}e12" for count in programme.frames)
    return markdown(
        ["stage", "grows with", "how"],
        [
            ["render", "data sets, scenes, views, samples", "linearly: scenes are independent jobs"],
            ["render", "pixels", f"pixels^{by_pixels:.2f} between {min(speeds)} and {max(speeds)} px a side, measured"],
            ["scenes on disk", "images, pixels", "linearly"],
            ["adapt", "data sets, steps, images in a step", "linearly: data sets are independent jobs"],
            ["adapt, fine-tune", "frames in a scene",
             f"{low} operations an image at {programme.frames[0]} frames, {high} at {programme.frames[1]}, counted: "
             "linear in the frames, all of which global attention sees"],
            ["mine", "layers", f"layers^{by_layers:.2f}, measured"],
            ["mine", "adapters x rank",
             f"(N r)^{power(sizes):.2f} between {min(sizes)[0]} and {max(sizes)[0]}, measured"],
            ["adapters, subspaces on disk", "rank, k", "linearly"],
        ],
    )  # fmt: skip


def content() -> str:
    programme, units = Programme(), read_json(UNITS)
    rendering, rows = read_rows(RENDERING)[-1], read_rows(MINING)
    llvm = [row for row in rendering["rows"] if row["variant"] == "llvm"]
    speeds = {row["resolution"]: row["images_per_second_and_core"] for row in llvm}
    mining = [newest(rows, benchmark="mining", shape=shape, clock="wall") for shape in ("qkv", "proj", "fc1", "fc2")]
    data = f"{programme.datasets} data sets of {programme.scenes} scenes of {programme.views} views"
    origin = f"{rendering['device']}, commits {rendering['commit']} and {mining[0]['commit']}"
    parts = [
        f"{data}; times measured ({origin}), bytes measured on one scene of four views, or exact:",
        measured_table(programme, units, speeds, mining),
        denoising_sentence(read_rows(DENOISING)[-1]),
        f"Modelled, not measured: the operations are counted, their speed is assumed, {SHARE:.0%} of the "
        f"{roofline.FLOPS / 1e12:.0f} TFLOP/s that large bfloat16 products reach on an H100. Nothing of this was timed "
        "on a GPU. The steps are the release's for fine-tuning; those of the adapters are published nowhere and taken "
        "to be the same.",
        modelled_table(programme, units),
        *together_text(programme, units, read_rows(TOGETHER)),
        "How each grows:",
        growth_table(programme, units, speeds, rows),
    ]
    return "\n\n".join(parts)


def updated(text: str) -> str:
    """The page with what stands between its markers written anew."""
    pattern = re.compile(r"(<!-- programme -->\n).*?(<!-- /programme -->)", flags=re.DOTALL)
    written = content()
    return pattern.sub(lambda found: f"{found[1]}{written}\n{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    parser.add_argument("--count", action="store_true", help="measure bytes and count operations anew")
    arguments = parser.parse_args()
    if arguments.count:
        write_json(UNITS, count_units())
    before = PAGE.read_text(encoding="utf-8")
    after = updated(before)
    if arguments.check:
        sys.exit(f"{PAGE} is out of date: python benchmarks/programme.py" if after != before else 0)
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
